"""Degrades images the way samples of a diffusion model are imperfect, so that rewards stay meaningful on them."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

ROUND_TRIP_FRACTION = 0.25


def degrade(images: Tensor, rng: np.random.Generator, vae: AutoencoderKL | None = None) -> Tensor:
    """Blur, noise, ghosting or wrong exposure on half of the images.  images: (B, 3, 64, 64) in [0, 1]; returns a copy.

    vae: if given, a quarter of the images also passes through its latents with noise added there.
    """
    count = len(images)
    degraded = images.clone()
    kind = torch.from_numpy(rng.integers(0, 8, count)).to(images.device)
    strength = torch.from_numpy(rng.random(count)).to(images).view(-1, 1, 1, 1)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    degraded = torch.where((kind == 0).view(-1, 1, 1, 1), blurred, degraded)
    noisy = images + 0.12 * strength * torch.randn_like(images)
    degraded = torch.where((kind == 1).view(-1, 1, 1, 1), noisy, degraded)
    ghosted = images.lerp(images.roll(1, 0), 0.3 * strength)  # another image of the batch shows through
    degraded = torch.where((kind == 2).view(-1, 1, 1, 1), ghosted, degraded)
    exposed = images * (0.85 + 0.3 * strength)
    degraded = torch.where((kind == 3).view(-1, 1, 1, 1), exposed, degraded).clamp(0, 1)
    if vae is not None:
        size = max(1, int(count * ROUND_TRIP_FRACTION))
        start = int(rng.integers(0, count - size + 1))
        part = slice(start, start + size)
        with torch.no_grad():
            latents = vae.encode(degraded[part] * 2 - 1).latent_dist.mode()
            noise_level = 0.6 * strength[part] / vae.config.scaling_factor
            decoded = vae.decode(latents + noise_level * torch.randn_like(latents)).sample
        degraded[part] = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return degraded
