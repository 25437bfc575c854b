"""Features that know no language: where a VAE sees something stand."""

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.models.loading import load_module
from textcraftor.models.weights import loading
from textcraftor.rewards.base import Reward, checked_prompts


class Autoencoder(Reward):
    """The latents of a VAE without their mean, for `evaluate.diversity_judge`; it scores nothing.

    config.path: folder of an AutoencoderKL, such as BASE/vae.  A tower that learned from captions sees of four
    pictures of one prompt mostly what the prompt says, so a model that draws four different mistakes looks diverse
    to it and one that draws the truth four times looks collapsed; so it is with the ground, which the mean carries
    (docs/decisions/diversity.md).
    """

    range = None

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        with loading(config.path, "an AutoencoderKL (config.json and diffusion_pytorch_model.safetensors)"):
            self.vae = load_module(AutoencoderKL, config.path, dtype)
        self.resolution = self.vae.config.sample_size

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 0): no prompt is read."""
        return torch.empty(len(checked_prompts(self.name, prompts)), 0, device=self.device)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, C * h * w) float32, L2-normalised: each channel's deviation from its mean over the places.

        images: (B, 3, H, W) float in [0, 1]; H and W are what the VAE takes.
        """
        latents = self.vae.encode(images.to(self.dtype) * 2 - 1).latent_dist.mode().float()
        return F.normalize((latents - latents.mean((2, 3), keepdim=True)).flatten(1), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> NoReturn:
        """Raises RewardError: likeness is between pictures, and one picture has none."""
        raise RewardError(f"Reward {self.name!r} (kind vae) scores no picture. Name it as evaluate.diversity_judge only")
