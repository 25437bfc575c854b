"""PickScore: human preference, learned from choices between two images for a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from textcraftor.config import RewardConfig
from textcraftor.rewards.base import CosineReward, text_tower_dropped
from textcraftor.rewards.huggingface import count_longer, load_model, load_preprocess, load_tokenizer


class PickScore(CosineReward):
    """exp(logit_scale) * cosine of each image with its own prompt; exp(logit_scale) is about 100.

    config.path: folder or hub id of a transformers CLIPModel (`yuvalkirstain/PickScore_v1`, a ViT-H/14).
    config.tokenizer: folder or hub id of its tokenizer, by default config.path.
    SD 1.5 scores 20.5 to 21, a tuned encoder 22 to 24.  Source: Kirstain et al. 2023, arXiv 2305.01569.
    """

    default_version = "1"

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        model = load_model(CLIPModel, config.path)
        preprocess = load_preprocess(config.path, model.config.vision_config.image_size, dtype)
        # Read before the cast: in half precision the scale would be off by a thousandth.
        scale = model.logit_scale.double().exp().item()
        super().__init__(name, config, dtype, preprocess, scale)
        self.tokenizer = load_tokenizer(config.tokenizer or config.path, model)
        self.context_length: int = model.config.text_config.max_position_embeddings
        self.model: Any = model.to(dtype)
        self.has_text_tower = True

    def drop_text_tower(self) -> None:
        """Free the text tower."""
        if self.has_text_tower:
            del self.model.text_model, self.model.text_projection
            self.has_text_tower = False

    def truncated(self, prompts: Sequence[str]) -> int:
        """Number of prompts longer than the context."""
        return count_longer(self.tokenizer, prompts, self.context_length)

    def _encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def _encode_text(self, prompts: list[str]) -> Tensor:
        if not self.has_text_tower:
            raise text_tower_dropped(self.name)
        # Padded to the full context: features must not depend on the other prompts of the batch.
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        ).to(self.device)
        features: Tensor = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return features
