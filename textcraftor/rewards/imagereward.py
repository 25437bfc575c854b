"""ImageReward: human preference, from a text encoder with cross-attention to the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError
from textcraftor.models.weights import find_weights, loading, read_tensors, require_matching_keys
from textcraftor.rewards.base import Reward, check_batch, check_width, validate_prompts
from textcraftor.rewards.blip import load_blip
from textcraftor.rewards.head import fold_layers
from textcraftor.rewards.huggingface import count_longer
from textcraftor.rewards.preprocess import Preprocess

FILES = ("ImageReward.safetensors", "ImageReward.pt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores on its authors' data
CONTEXT = 35  # tokens
ADDED = ("[DEC]", "[ENC]")  # tokens that BLIP adds to BERT's 30,522


class ImageReward(Reward):
    """(raw - mean) / std of a linear head on the [CLS] token of a BERT that attends to the image; about N(0, 1).

    config.path: ImageReward.pt (or the same as safetensors), or its folder, which also holds med_config.json.
    config.tokenizer: folder or hub id of BERT's tokenizer (published: google-bert/bert-base-uncased), by default that
    folder.
    The text encoder attends to the image, so it cannot be dropped and text features are the token ids.
    SD 1.5 scores about -0.15, a tuned encoder 1.4.  Raises ModelError if weights are missing or do not fit.
    Source: Xu et al. 2023, arXiv 2304.05977.
    """

    default_version = "1.0"

    weight: Tensor
    bias: Tensor

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        path = _weights(Path(config.path))
        state = read_tensors(path, "ImageReward's tensors blip.* and mlp.layers.*")
        require_matching_keys(path, "ImageReward", unexpected=[key for key in state if not key.startswith(("blip.", "mlp."))])
        with loading(path, "ImageReward's weights"):
            self.blip = load_blip(state, path, path.parent / "med_config.json").to(dtype)
        layers = {key.removeprefix("mlp."): value for key, value in state.items() if key.startswith("mlp.")}
        weight, bias = fold_layers(layers, path, prefix="mlp.")
        if len(weight) != self.blip.text.config.hidden_size:
            raise ModelError(
                f"{path}: mlp.layers expects width {len(weight)}, the text encoder has width "
                f"{self.blip.text.config.hidden_size}. They belong to different models"
            )
        self.register_buffer("weight", (weight / STD).float())
        self.register_buffer("bias", ((bias - MEAN) / STD).float())
        self.preprocess = Preprocess(self.blip.image.config.image_size, dtype=dtype)
        self.resolution = self.preprocess.size
        self.tokenizer = _tokenizer(config.tokenizer or str(path.parent), self.blip.text.config.vocab_size)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 70) float32: 35 token ids, then their attention mask.  Longer prompts are truncated.

        Integers below 2^24, which float32 represents exactly; half precision would not.
        """
        tokens = self.tokenizer(
            validate_prompts(self.name, prompts),
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        )
        return torch.cat([tokens.input_ids, tokens.attention_mask], dim=1).to(self.device, torch.float32)

    def image_features(self, images: Tensor) -> Tensor:
        """The image tower's class token, independent of the prompt: (B, D) float32, L2-normalised, gradient kept."""
        return F.normalize(self._encode_image(images)[:, 0].float(), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Normalised preference score of each image with its own prompt: (B,), differentiable with respect to the images."""
        check_batch(self.name, images, text_features)
        check_width(self.name, text_features, 2 * CONTEXT)
        token_ids, mask = text_features.to(self.device).round().long().split(CONTEXT, dim=1)
        image_states = self._encode_image(images)
        output = self.blip.text(input_ids=token_ids, attention_mask=mask, encoder_hidden_states=image_states)
        return output.last_hidden_state[:, 0].float() @ self.weight + self.bias

    def truncated(self, prompts: Sequence[str]) -> int:
        """Number of prompts longer than 35 tokens."""
        return count_longer(self.tokenizer, prompts, CONTEXT)

    def _encode_image(self, images: Tensor) -> Tensor:
        """Hidden states of the image tower, (B, patches + 1, D), in the tower's dtype."""
        states: Tensor = self.blip.image(pixel_values=self.preprocess(images)).last_hidden_state
        return states


def _weights(path: Path) -> Path:
    return path if not path.is_dir() or path == Path() else find_weights(path, FILES)


def _tokenizer(path: str, vocabulary: int) -> Any:
    """BERT's tokenizer with BLIP's two tokens.  Raises ModelError if it is missing or belongs to another model."""
    with loading(path, "BERT's tokenizer (tokenizer.json; published: google-bert/bert-base-uncased)"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
    if len(tokenizer) != vocabulary or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ModelError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens with {' and '.join(ADDED)}, the text encoder expects "
            f"{vocabulary}. Use the one it was trained with: google-bert/bert-base-uncased"
        )
    return tokenizer
