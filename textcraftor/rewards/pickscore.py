"""PickScore: which of two images people would pick for a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from textcraftor.config import RewardConfig
from textcraftor.rewards.base import CosineReward, dropped
from textcraftor.rewards.huggingface import load_model, load_preprocess, load_tokenizer


class PickScore(CosineReward):
    """exp(logit_scale) * cosine of image and prompt, diagonal; exp(logit_scale) is about 100.

    config.path: folder or hub id of a transformers CLIPModel (`yuvalkirstain/PickScore_v1`, a ViT-H/14).
    config.tokenizer: where its tokenizer lies, if not there.
    SD 1.5 scores 20.5 to 21, a tuned encoder 22 to 24.  Source: Kirstain et al. 2023, arXiv 2305.01569.
    """

    default_version = "1"

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        model = load_model(CLIPModel, config.path)
        preprocess = load_preprocess(config.path, model.config.vision_config.image_size, dtype)
        # Read before the cast: rounded to half precision, the scale would be off by a thousandth.
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
        """How many of the prompts are longer than the context."""
        lengths = (len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
        return sum(length > self.context_length for length in lengths)

    def _encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def _encode_text(self, prompts: list[str]) -> Tensor:
        if not self.has_text_tower:
            raise dropped(self.name)
        # Padded to the whole context: features must not depend on the neighbours in the batch.
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        ).to(self.device)
        features: Tensor = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return features
