"""The autoencoder: (3, 64, 64) images to (4, 8, 8) latents and back, a factor of 8 as in Stable Diffusion."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.fit import Schedule, fit, generator

SCHEDULE = Schedule(steps=1500, batch=24, peak_lr=2e-3, ema=0.99, weight_decay=0.0)
OBJECT_SCHEDULE = Schedule(steps=1200, batch=16, peak_lr=1.5e-3, ema=0.99, weight_decay=0.0)
DECODER_SCHEDULE = Schedule(steps=1000, batch=24, peak_lr=1.2e-3, ema=0.99, weight_decay=0.0)
LATENT_NOISE = 0.05  # on unit-variance latents, so that the decoder tolerates the UNet's small errors
OBJECT_WEIGHT = 6.0


def new_vae(channels: Sequence[int] = (32, 48, 64, 96)) -> AutoencoderKL:
    """An untrained autoencoder.  No attention: the receptive field of four levels covers the whole image."""
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
    """L1 + MSE + L1 of the image gradients, which keeps small shapes sharp.  Both: (B, 3, H, W) in [-1, 1]."""
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 0.5 * F.l1_loss(_edges(decoded), _edges(images))


def object_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """The reconstruction loss with coloured pixels weighted higher, plus L1 of the 8 x 8 px mean colours.

    Objects cover a tenth of an image.  With equal weights the autoencoder learns their outlines but not their colours.
    """
    coloured = (images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) > 0.3
    weight = 1 + (OBJECT_WEIGHT - 1) * F.max_pool2d(coloured.float(), 5, 1, 2)
    error = decoded - images
    coarse = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
    return (weight * (error.abs() + error.square())).mean() + F.l1_loss(_edges(decoded), _edges(images)) + coarse


def train_vae(
    vae: AutoencoderKL, work: Path, seed: int, first: Schedule = SCHEDULE, second: Schedule = OBJECT_SCHEDULE
) -> None:
    """Train in place: first with equal pixel weights, then with `object_loss`.

    Sets `scaling_factor` in the config to what gives latents unit variance, as the UNet expects.
    """

    def train(label: str, schedule: Schedule, loss: Callable[[Tensor, Tensor], Tensor], kl_weight: float) -> None:
        def loss_at(rng: np.random.Generator) -> Tensor:
            images = batches.render_batch(batches.sample_scenes(schedule.batch, rng), rng).to(vae.device) * 2 - 1
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            # The small KL term only keeps latents bounded.
            return loss(decoded.float(), images) + kl_weight * posterior.kl().mean()

        fit(label, vae, loss_at, schedule, work / f"{label}.pt", seed)

    train("vae", first, reconstruction_loss, 2e-6)
    train("vae_things", second, object_loss, 5e-7)
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
            latents = latents + LATENT_NOISE / vae.config.scaling_factor * torch.randn_like(latents)
        return object_loss(vae.decode(latents).sample.float(), images)

    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fit("vae_decoder", vae, loss_at, schedule, work / "vae_decoder.pt", seed)
