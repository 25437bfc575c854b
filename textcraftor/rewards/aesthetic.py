"""The LAION aesthetic predictor: how much people like an image, whatever the prompt."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError
from textcraftor.models.weights import read_tensors
from textcraftor.rewards.base import PromptFreeReward, check_batch
from textcraftor.rewards.head import fold_layers
from textcraftor.rewards.huggingface import load_model, load_preprocess


class Aesthetic(PromptFreeReward):
    """A linear function of the L2-normalised projected CLIP image embedding, trained on ratings from 1 to 10.

    config.path: folder or hub id of a CLIP image tower; published: openai/clip-vit-large-patch14.
    config.head: file of the linear layers, default PATH/head.safetensors; published: sac+logos+ava1-l14-linearMSE.pth.
    SD 1.5 scores about 5.26, a tuned encoder 6 to 7; above 9 the model has collapsed (paper figure 6).
    Raises ModelError if weights are missing, or head and tower differ in width.
    Source: LAION's improved-aesthetic-predictor.
    """

    default_version = "2"
    range = (1.0, 10.0)

    weight: Tensor
    bias: Tensor

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        tower = load_model(CLIPVisionModelWithProjection, config.path, ignore=("text_", "logit_scale"))
        self.preprocess = load_preprocess(config.path, tower.config.image_size, dtype)
        self.resolution = self.preprocess.size
        self.tower = tower.to(dtype)
        head = Path(config.head or f"{config.path}/head.safetensors")
        weight, bias = fold_layers(read_tensors(head, "the linear layers layers.{0,2,4,6,7}.{weight,bias}"), head)
        if len(weight) != tower.config.projection_dim:
            raise ModelError(
                f"{head} expects embeddings of width {len(weight)}, the tower {config.path} has width "
                f"{tower.config.projection_dim}. They belong to different models"
            )
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised, gradient kept.  images: (B, 3, H, W) float in [0, 1]."""
        return F.normalize(self.tower(self.preprocess(images)).image_embeds.float(), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Predicted ratings, (B,), differentiable with respect to the images.  text_features: (B, D), ignored."""
        check_batch(self.name, images, text_features)
        return self.image_features(images) @ self.weight + self.bias
