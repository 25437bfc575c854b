"""The autoencoder: 64 px pictures to 4 x 8 x 8 latents and back, factor 8 as in Stable Diffusion."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.fit import Schedule, fit, generator

SCHEDULE = Schedule(steps=1500, batch=24, peak_lr=2e-3, ema=0.99, weight_decay=0.0)
SECOND_SCHEDULE = Schedule(steps=1200, batch=16, peak_lr=1.5e-3, ema=0.99, weight_decay=0.0)
DECODER_SCHEDULE = Schedule(steps=1000, batch=24, peak_lr=1.2e-3, ema=0.99, weight_decay=0.0)
JITTER = 0.05  # noise on unit-variance latents: the decoder must forgive a denoiser's small errors
THING_WEIGHT = 6.0


def new_vae(channels: Sequence[int] = (32, 48, 64, 96)) -> AutoencoderKL:
    """An untrained autoencoder; no attention, as four levels of convolution see the whole picture."""
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
    """L1 + MSE + L1 on the edges, all on (B, 3, H, W) in [-1, 1].  The edge term keeps small shapes sharp."""
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 0.5 * F.l1_loss(_edges(decoded), _edges(images))


def thing_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """The same with coloured pixels counting more, and L1 on coarse colour.

    Things cover a tenth of a picture: with all pixels alike the autoencoder gets outlines right and colours wrong.
    """
    coloured = (images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) > 0.3
    weight = 1 + (THING_WEIGHT - 1) * F.max_pool2d(coloured.float(), 5, 1, 2)
    error = decoded - images
    coarse = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
    return (weight * (error.abs() + error.square())).mean() + F.l1_loss(_edges(decoded), _edges(images)) + coarse


def train_vae(
    vae: AutoencoderKL, work: Path, seed: int, first: Schedule = SCHEDULE, second: Schedule = SECOND_SCHEDULE
) -> None:
    """Train in place: first on whole pictures, then with an eye to the things in them.

    Afterwards `scaling_factor` is measured, so that latents have unit variance as the UNet expects.
    """

    def train(label: str, schedule: Schedule, loss: Callable[[Tensor, Tensor], Tensor], pull: float) -> None:
        def loss_at(rng: np.random.Generator) -> Tensor:
            images = corpus.pictures(corpus.scenes(schedule.batch, rng), rng).to(vae.device) * 2 - 1
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            # A tiny pull to the prior: just enough to keep latents bounded.
            return loss(decoded.float(), images) + pull * posterior.kl().mean()

        fit(label, vae, loss_at, schedule, work / f"{label}.pt", seed)

    train("vae", first, reconstruction_loss, 2e-6)
    train("vae_things", second, thing_loss, 5e-7)
    rng = generator(seed, "vae scale")
    with torch.no_grad():
        images = corpus.pictures(corpus.scenes(256, rng), rng).to(vae.device) * 2 - 1
        latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def train_decoder(vae: AutoencoderKL, work: Path, seed: int, schedule: Schedule = DECODER_SCHEDULE) -> None:
    """Train the decoder alone, in place.  Latents stay what they are, so a UNet may learn them at the same time.

    Stable Diffusion's own autoencoder was sharpened in this way after its UNet was trained.
    """
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)

    def loss_at(rng: np.random.Generator) -> Tensor:
        images = corpus.pictures(corpus.scenes(schedule.batch, rng), rng).to(vae.device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            latents = latents + JITTER / vae.config.scaling_factor * torch.randn_like(latents)
        return thing_loss(vae.decode(latents).sample.float(), images)

    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fit("vae_decoder", vae, loss_at, schedule, work / "vae_decoder.pt", seed)
