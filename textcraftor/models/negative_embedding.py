"""The negative embedding: the unconditional input of guidance, learned (ReNeg, arXiv 2412.19637).

It replaces the embedding of the empty prompt from the switch on. A candidate stores it as a folder, like any module; its one
tensor can be passed to a diffusers pipeline as `negative_prompt_embeds`.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textcraftor.artifact import write_json
from textcraftor.errors import ModelError
from textcraftor.models.conditioning import Conditioning

KEY = "negative_prompt_embeds"
FILE = "model.safetensors"


class NegativeEmbedding(nn.Module):
    """One learned embedding for all prompts.

    weight: (1, L, D), float32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().float())

    def replace(self, conditioning: Conditioning) -> Conditioning:
        """Replace the empty prompt's half of the text embeddings by this one. SDXL's pooled half stays.

        Raises ModelError when the embedding belongs to another base model.
        """
        _, positive = conditioning.prompt_embeds.chunk(2)
        if self.weight.shape[1:] != positive.shape[1:]:
            raise ModelError(
                f"The negative embedding is {tuple(self.weight.shape[1:])} (tokens, width), the base's prompt embeddings "
                f"are {tuple(positive.shape[1:])}: it belongs to another base model"
            )
        return replace(conditioning, prompt_embeds=torch.cat([self.weight.to(positive).expand_as(positive), positive]))

    def save_pretrained(self, folder: Path) -> None:
        """Write the embedding and its config.json to a new folder."""
        folder.mkdir(parents=True)
        save_file({KEY: self.weight.detach().cpu().contiguous()}, folder / FILE)
        write_json(folder / "config.json", {"kind": "negative_embedding", "shape": list(self.weight.shape)})

    @classmethod
    def from_pretrained(cls, folder: Path) -> "NegativeEmbedding":
        """Raises ModelError when the file is missing, damaged or holds something else."""
        try:
            tensors = load_file(folder / FILE)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / FILE} cannot be read: {error}. Train the candidate again") from None
        if tensors.keys() != {KEY} or tensors[KEY].ndim != 3 or len(tensors[KEY]) != 1:
            raise ModelError(f"{folder / FILE} holds {', '.join(sorted(tensors))}, not one {KEY} of shape (1, L, D)")
        return cls(tensors[KEY])
