"""ImageReward: what people prefer, from a model that reads the prompt while looking at the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, RewardError
from textcraftor.models.weights import loading, read_tensors, refuse_misfit
from textcraftor.rewards.base import Reward, check_batch, checked_prompts
from textcraftor.rewards.blip import load_blip
from textcraftor.rewards.head import collapse
from textcraftor.rewards.preprocess import Preprocess

FILES = ("ImageReward.safetensors", "ImageReward.pt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores on its authors' data
CONTEXT = 35  # tokens; shorter prompts are padded to it
ADDED = ("[DEC]", "[ENC]")  # what BLIP adds to BERT's 30,522 tokens


class ImageReward(Reward):
    """(raw - mean) / std of a linear head on the [CLS] token of a BERT that attends to the image; about N(0, 1).

    config.path: ImageReward.pt (or the same as safetensors), or the folder that holds it; med_config.json lies beside
    it.  config.tokenizer: folder or hub id of BERT's tokenizer (published: google-bert/bert-base-uncased), default that
    folder.
    Prompt and image meet in the text encoder, so there is no text tower to drop; what is cached of a prompt are its
    tokens.  SD 1.5 scores about -0.15, a tuned encoder 1.4.  Source: Xu et al. 2023, arXiv 2304.05977.
    """

    default_version = "1.0"

    weight: Tensor
    bias: Tensor

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        path = _weights(Path(config.path))
        state = read_tensors(path, "ImageReward's tensors blip.* and mlp.layers.*")
        refuse_misfit(path, "ImageReward", unexpected=[key for key in state if not key.startswith(("blip.", "mlp."))])
        with loading(path, "ImageReward's weights"):
            self.blip = load_blip(state, path, path.parent / "med_config.json").to(dtype)
        layers = {key.removeprefix("mlp."): value for key, value in state.items() if key.startswith("mlp.")}
        weight, bias = collapse(layers, path, prefix="mlp.")
        if len(weight) != self.blip.text.config.hidden_size:
            raise ModelError(
                f"{path}: mlp.layers reads {len(weight)} numbers, the text encoder makes "
                f"{self.blip.text.config.hidden_size}. They belong to different models"
            )
        self.register_buffer("weight", (weight / STD).float())
        self.register_buffer("bias", ((bias - MEAN) / STD).float())
        self.preprocess = Preprocess(self.blip.image.config.image_size, dtype=dtype)
        self.resolution = self.preprocess.size
        self.tokenizer = _tokenizer(config.tokenizer or str(path.parent), self.blip.text.config.vocab_size)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 70) float32: 35 token ids, then 35 times 1 for a token and 0 for padding. Longer prompts are cut.

        Whole numbers below 2^24, so float32 holds them exactly; half precision would not.
        """
        tokens = self.tokenizer(
            checked_prompts(self.name, prompts),
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        )
        return torch.cat([tokens.input_ids, tokens.attention_mask], dim=1).to(self.device, torch.float32)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept: the image tower's class token, before any prompt is read."""
        return F.normalize(self._see(images)[:, 0].float(), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """The normalised preference (B,) of each image for its own prompt, differentiable to the images."""
        check_batch(self.name, images, text_features)
        if text_features.shape[1] != 2 * CONTEXT:
            raise RewardError(
                f"Reward {self.name!r}: text features are {text_features.shape[1]} wide instead of {2 * CONTEXT}. "
                "They are another reward's; compute them with this one's text_features"
            )
        token_ids, mask = text_features.to(self.device).round().long().split(CONTEXT, dim=1)
        seen = self._see(images)
        read = self.blip.text(input_ids=token_ids, attention_mask=mask, encoder_hidden_states=seen)
        return read.last_hidden_state[:, 0].float() @ self.weight + self.bias

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than 35 tokens."""
        lengths = (len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
        return sum(length > CONTEXT for length in lengths)

    def _see(self, images: Tensor) -> Tensor:
        """(B, patches + 1, D): what the image tower says, in its dtype."""
        seen: Tensor = self.blip.image(pixel_values=self.preprocess(images)).last_hidden_state
        return seen


def _weights(path: Path) -> Path:
    if not path.is_dir() or path == Path():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path} holds no weights; expected one of {', '.join(FILES)}")


def _tokenizer(path: str, vocabulary: int) -> Any:
    """BERT's tokenizer with the two tokens that BLIP adds. Raises ModelError when it is missing or another model's."""
    with loading(path, "BERT's tokenizer (tokenizer.json; published: google-bert/bert-base-uncased)"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
    if len(tokenizer) != vocabulary or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ModelError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens with {' and '.join(ADDED)}, the text encoder reads "
            f"{vocabulary}. Use the one it was trained with: google-bert/bert-base-uncased"
        )
    return tokenizer
