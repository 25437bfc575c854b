"""VAE latents as image features: for measuring diversity in layout, not for scoring."""

from typing import NoReturn

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.models.loading import load_module
from textcraftor.models.weights import loading
from textcraftor.rewards.base import PromptFreeReward


class Autoencoder(PromptFreeReward):
    """Mean-free latents of a VAE as features for `evaluate.diversity_judge`; cannot score.

    config.path: folder of an AutoencoderKL, such as BASE/vae.
    Features learned from captions encode mostly what the prompt says: four different mistakes look diverse in them,
    four correct images look collapsed. The channel means are removed because they encode the background, which prompts
    name too (docs/decisions/diversity.md).
    Raises ModelError if the weights are missing or do not fit.
    """

    range = None

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        with loading(config.path, "an AutoencoderKL (config.json and diffusion_pytorch_model.safetensors)"):
            self.vae = load_module(AutoencoderKL, config.path, dtype)
        self.resolution = self.vae.config.sample_size

    def image_features(self, images: Tensor) -> Tensor:
        """(B, C * h * w) float32, L2-normalised: latents minus the spatial mean of each channel.

        images: (B, 3, H, W) float in [0, 1], H and W multiples of the VAE's factor.
        """
        latents = self.vae.encode(images.to(self.dtype) * 2 - 1).latent_dist.mode().float()
        return F.normalize((latents - latents.mean((2, 3), keepdim=True)).flatten(1), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> NoReturn:
        """Raises RewardError: this kind provides features only."""
        raise RewardError(f"Reward {self.name!r} (kind vae) cannot score images. Use it as evaluate.diversity_judge only")
