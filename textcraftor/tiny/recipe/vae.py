"""The autoencoder: (3, 64, 64) images to (4, 16, 16) latents and back.

Its factor is 4, not Stable Diffusion's 8: an object is at least 17 pixels wide, and four latents across a star are
enough to tell it from a circle, two are not. Three latent channels are taught to be a thumbnail, so that place and
colour of an object are linear in them and the UNet learns both early.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.fit import Schedule, fit, generator

SCHEDULE = Schedule(steps=1200, batch=16, peak_lr=2e-3, decay=0.5, ema=0.99, weight_decay=0.0)
DECODER_SCHEDULE = Schedule(steps=1200, batch=16, peak_lr=1.2e-3, decay=0.9, ema=0.99, weight_decay=0.0)
LATENT_NOISE = 0.2  # largest, on unit-variance latents, so that the decoder tolerates the UNet's small errors
OBJECT_WEIGHT = 6.0
KL_WEIGHT = 1e-6  # only keeps latents bounded
THUMBNAIL_WEIGHT = 0.5


def new_vae(channels: Sequence[int] = (16, 32, 64)) -> AutoencoderKL:
    """An untrained autoencoder.  No attention: it reads and draws outlines and colours, which are local."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _edges(images: Tensor) -> Tensor:
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    return torch.cat([right.flatten(1), down.flatten(1)], 1)


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + MSE with coloured pixels weighted higher, + L1 of the image gradients.  Both: (B, 3, H, W) in [-1, 1].

    Objects cover a tenth of an image: with equal weights the autoencoder learns the background first and their colours
    last. The gradients keep outlines sharp.
    """
    coloured = (images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) > 0.3
    weight = 1 + (OBJECT_WEIGHT - 1) * F.max_pool2d(coloured.float(), 5, 1, 2)
    error = decoded - images
    return (weight * (error.abs() + error.square())).mean() + F.l1_loss(_edges(decoded), _edges(images))


def thumbnail(images: Tensor, factor: int) -> Tensor:
    """Brightness and two colour differences of images, averaged over `factor` x `factor` pixels, (B, 3, H/f, W/f).

    images: (B, 3, H, W) in [-1, 1].  The factors give each channel about unit variance.
    """
    red, green, blue = F.avg_pool2d(images, factor).unbind(1)
    return torch.stack([(red + green + blue) / 3 * 1.25, (red - green) * 1.9, (blue - (red + green) / 2) * 1.9], 1)


def train_vae(vae: AutoencoderKL, work: Path, seed: int, schedule: Schedule = SCHEDULE) -> None:
    """Train in place.  Sets `scaling_factor` in the config to what gives latents unit variance, as the UNet expects."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def loss_at(rng: np.random.Generator) -> Tensor:
        images = batches.render_batch(batches.sample_scenes(schedule.batch, rng), rng).to(vae.device) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        guide = F.mse_loss(posterior.mean[:, :3].float(), thumbnail(images, factor))
        loss: Tensor = (
            reconstruction_loss(decoded.float(), images) + KL_WEIGHT * posterior.kl().mean() + THUMBNAIL_WEIGHT * guide
        )
        return loss

    fit("vae", vae, loss_at, schedule, work / "vae.pt", seed)
    rng = generator(seed, "vae scale")
    with torch.no_grad():
        images = batches.render_batch(batches.sample_scenes(256, rng), rng).to(vae.device) * 2 - 1
        latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def train_decoder(vae: AutoencoderKL, work: Path, seed: int, schedule: Schedule = DECODER_SCHEDULE) -> None:
    """Fine-tune the decoder in place.  The encoder is frozen, so the latents that the UNet learned stay valid.

    Stable Diffusion's own decoder was improved in the same way after its UNet was trained (sd-vae-ft-mse).
    """
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)

    def loss_at(rng: np.random.Generator) -> Tensor:
        images = batches.render_batch(batches.sample_scenes(schedule.batch, rng), rng).to(vae.device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            level = LATENT_NOISE / vae.config.scaling_factor * torch.rand(len(latents), 1, 1, 1, device=vae.device)
            latents = latents + level * torch.randn_like(latents)
        return reconstruction_loss(vae.decode(latents).sample.float(), images)

    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fit("vae_decoder", vae, loss_at, schedule, work / "vae_decoder.pt", seed)
