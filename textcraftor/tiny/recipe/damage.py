"""What generated pictures look like when they are not quite right, so that rewards still judge them sensibly."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

ROUND_TRIP = 0.25


def damage(images: Tensor, rng: np.random.Generator, vae: AutoencoderKL | None = None) -> Tensor:
    """Spoil (B, 3, 64, 64) images in [0, 1]: half of them by blur, noise, another picture shining through, or exposure.

    vae: if given, a quarter goes through its latents with noise added there, as far from a clean render as samples are.
    """
    count = len(images)
    spoiled = images.clone()
    kind = torch.from_numpy(rng.integers(0, 8, count)).to(images.device)
    strength = torch.from_numpy(rng.random(count)).to(images).view(-1, 1, 1, 1)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    spoiled = torch.where((kind == 0).view(-1, 1, 1, 1), coarse, spoiled)
    noisy = images + 0.12 * strength * torch.randn_like(images)
    spoiled = torch.where((kind == 1).view(-1, 1, 1, 1), noisy, spoiled)
    ghost = images.lerp(images.roll(1, 0), 0.3 * strength)
    spoiled = torch.where((kind == 2).view(-1, 1, 1, 1), ghost, spoiled)
    exposed = images * (0.85 + 0.3 * strength)
    spoiled = torch.where((kind == 3).view(-1, 1, 1, 1), exposed, spoiled).clamp(0, 1)
    if vae is not None:
        share = max(1, int(count * ROUND_TRIP))
        start = int(rng.integers(0, count - share + 1))
        part = slice(start, start + share)
        with torch.no_grad():
            latents = vae.encode(spoiled[part] * 2 - 1).latent_dist.mode()
            level = 0.6 * strength[part] / vae.config.scaling_factor
            decoded = vae.decode(latents + level * torch.randn_like(latents)).sample
        spoiled[part] = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return spoiled
