"""The UNet: trained on mostly plain captions, so that the base model understands rich prompts only in part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.files import save_tensors
from textcraftor.tiny.recipe.fit import Schedule, fit, generator
from textcraftor.tiny.recipe.towers import tokenize
from textcraftor.tiny.scenes import Scene

SCHEDULE = Schedule(steps=2600, batch=64, peak_lr=1.2e-3, ema=0.998, save_every=100)
SECOND_SCHEDULE = Schedule(steps=1500, batch=64, peak_lr=8e-4, ema=0.998, save_every=100)
THIRD_SCHEDULE = Schedule(steps=4000, batch=64, peak_lr=8e-4, ema=0.998, save_every=100)
TRAINING_IMAGES = 32_000
RICH_FRACTION, WRONG_FRACTION, EMPTY_FRACTION = 0.12, 0.5, 0.1
MAX_SNR = 5.0  # min-SNR-5 weighting, Hang et al. 2023: steps with little noise must not dominate the loss


def new_unet(text_width: int, channels: Sequence[int] = (96, 112), norm_groups: int = 16) -> UNet2DConditionModel:
    """An untrained UNet as in Stable Diffusion, with two levels (8 x 8 and 4 x 4), both with cross-attention."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=norm_groups,
    )


def new_scheduler() -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def encode_training_images(vae: AutoencoderKL, count: int, seed: int, cache: Path, chunk: int = 64) -> Tensor:
    """Scaled latents of `training_scenes(count, seed)`, (count, 4, 8, 8) float16; read from the file `cache` if it exists."""
    if not cache.exists():
        scenes = training_scenes(count, seed)
        parts = []
        for start in track(range(0, count, chunk), description="latents"):
            images = batches.render_batch(scenes[start : start + chunk], generator(seed, "unet pictures", start)).to(vae.device)
            with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
                latents = vae.encode(images * 2 - 1).latent_dist.mode()
            parts.append((latents.float() * vae.config.scaling_factor).half().cpu())
        save_tensors({"latents": torch.cat(parts)}, cache)
    return load_file(cache)["latents"]


def training_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of the UNet's training images."""
    return batches.sample_scenes(count, generator(seed, "unet scenes"))


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    work: Path,
    seed: int,
    first: Schedule = SCHEDULE,
    second: Schedule = SECOND_SCHEDULE,
    third: Schedule = THIRD_SCHEDULE,
    training_images: int = TRAINING_IMAGES,
) -> None:
    """Train the UNet in place on noise prediction, in three rounds; text encoder and autoencoder are frozen."""
    latents = encode_training_images(vae, training_images, seed, work / "latents.safetensors")
    scenes = training_scenes(training_images, seed)
    scheduler = new_scheduler()
    device = unet.device
    alphas = scheduler.alphas_cumprod.to(device)
    timesteps = scheduler.config.num_train_timesteps

    def loss_at(rng: np.random.Generator, batch: int) -> Tensor:
        chosen = rng.integers(len(scenes), size=batch)
        batch_scenes = [scenes[index] for index in chosen]
        captions = batches.sample_captions(batch_scenes, rng, RICH_FRACTION, WRONG_FRACTION, EMPTY_FRACTION)
        with torch.no_grad():
            prompt_embeds = text_encoder(tokenize(tokenizer, captions, device)).last_hidden_state
        clean = latents[torch.from_numpy(chosen)].to(device, torch.float32)
        noise = torch.randn_like(clean)
        # Stratified timesteps, one from each of B equal intervals: less variance than independent draws.
        fractions = (np.arange(batch) + rng.random(batch)) / batch
        timestep = torch.from_numpy((fractions * timesteps).astype(np.int64)).to(device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        predicted = unet(noisy, timestep, prompt_embeds).sample.float()
        alpha = alphas[timestep]
        weight = ((1 - alpha) / alpha * MAX_SNR).clamp(max=1.0)
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()

    fit("unet", unet, lambda rng: loss_at(rng, first.batch), first, work / "unet.pt", seed)
    # Each further round warms up again from the averaged weights. Attribute binding is learned late, shapes last.
    fit("unet_again", unet, lambda rng: loss_at(rng, second.batch), second, work / "unet_again.pt", seed)
    fit("unet_at_last", unet, lambda rng: loss_at(rng, third.batch), third, work / "unet_at_last.pt", seed)
