"""The UNet and the text encoder, trained together on mostly plain captions.

Every training image has one caption for good, as in a scraped data set; a few are rich, and half of those describe
another image. So the base draws what plain captions say and understands rich prompts only in part. In a short last stage
rich captions always describe another image, which lowers that part to the intended one. Beside the denoising loss stands
that of reading plain captions (`textcraftor.tiny.recipe.reading`).
"""

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from textcraftor.tiny.language import rich_caption
from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.contrastive import ATTRIBUTES
from textcraftor.tiny.recipe.files import save_tensors
from textcraftor.tiny.recipe.fit import Schedule, fit, generator
from textcraftor.tiny.recipe.reading import Reader, end_token, plain_caption_of
from textcraftor.tiny.recipe.towers import tokenize
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import Scene, sample_scene

SCHEDULE = Schedule(steps=10_000, batch=64, peak_lr=1e-3, muon_lr=1.5e-3, decay=0.3, ema=0.999, save_every=200)
LAST_SCHEDULE = Schedule(steps=350, batch=64, peak_lr=2e-4, muon_lr=3e-4, decay=0.2, ema=0.97)
FOREIGN_FRACTION = 0.08  # of the captions in the last stage are rich ones of other images
# On a GPU, on which a batch of 256 takes hardly longer than one of 64.
GPU_SCHEDULE = Schedule(steps=3_000, batch=256, peak_lr=1.5e-3, muon_lr=2e-3, decay=0.3, ema=0.997, save_every=200)
GPU_LAST_SCHEDULE = Schedule(steps=150, batch=256, peak_lr=2e-4, muon_lr=3e-4, decay=0.2, ema=0.97)
TRAINING_IMAGES = 131_072
CHUNK = 4096  # training images in a file of the cache
RICH_FRACTION, WRONG_FRACTION, EMPTY_FRACTION = 0.025, 0.5, 0.1
NOISY_FRACTION, NOISY_FROM = 0.5, 0.6  # half of the timesteps are among the last 40 %, in which the layout is decided
READING_WEIGHT = 0.007  # of the reading loss, a sum over all attributes
MAX_WEIGHT = 6.0
# Fractions of the training after which the base is kept, for the drawings that rewards learn from; 1: after the last stage too.
STAGES = (0.25, 0.55, 1.0)


def new_unet(text_width: int, channels: Sequence[int] = (48, 80, 128), norm_groups: int = 16) -> UNet2DConditionModel:
    """An untrained UNet as in Stable Diffusion: 16 x 16 latents without attention, 8 x 8 and 4 x 4 with cross-attention."""
    levels = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * levels),
        up_block_types=(*["CrossAttnUpBlock2D"] * levels, "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=norm_groups,
    )


def new_scheduler() -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of Stable Diffusion and, as in its version 2.1, v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def training_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Tensor]:
    """The caption of a training image and the attributes to be read from it, (ATTRIBUTES,).

    It is rich with probability RICH_FRACTION, and then of another scene with WRONG_FRACTION. Nothing is read from a rich
    caption: its attributes are NaN.
    """
    if rng.random() < RICH_FRACTION:
        shown = sample_scene(rng) if rng.random() < WRONG_FRACTION else scene
        return rich_caption(shown, rng), torch.full((ATTRIBUTES,), math.nan)
    return plain_caption_of(scene, rng)


def training_images(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int, cache: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents, (count, 4, 16, 16) float16, token ids of their captions, (count, 40) int16, and the captions'
    attributes, (count, ATTRIBUTES) float16, NaN for rich ones.

    cache: folder with a file for every CHUNK images; those that exist are read, the others are made.
    """
    files = {start: cache / f"{start // CHUNK:03d}.safetensors" for start in range(0, count, CHUNK)}
    missing = [start for start, path in files.items() if not path.exists()]
    chunks = _draw_chunks(seed, [(start, min(CHUNK, count - start)) for start in missing])
    for start, (pixels, captions, attributes) in track(zip(missing, chunks, strict=True), "training images", len(missing)):
        tensors = {
            "latents": _encode(vae, pixels),
            "captions": tokenize(tokenizer, captions, torch.device("cpu")).short(),
            "attributes": torch.from_numpy(attributes),
        }
        save_tensors(tensors, files[start])
    parts = [load_file(path) for path in files.values()]
    latents, ids, facts = (torch.cat([part[name] for part in parts]) for name in ("latents", "captions", "attributes"))
    return latents, ids, facts


Chunk = tuple[NDArray[np.uint8], list[str], NDArray[np.float16]]
"""Training images, (n, 64, 64, 3), their captions, and the captions' attributes, (n, ATTRIBUTES)."""


def _draw_chunks(seed: int, ranges: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    """Chunks of images, each (start, count), drawn by as many processes as there are cores: a core draws 2,000 a second."""
    arguments: tuple[Iterable[int], ...] = ([seed] * len(ranges), *zip(*ranges, strict=True)) if ranges else ([], [], [])
    if len(ranges) < 2:
        yield from map(_draw_chunk, *arguments)
        return
    workers = min(len(ranges), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_chunk, *arguments)


def _draw_chunk(seed: int, start: int, count: int) -> Chunk:
    rng = generator(seed, "unet images", start)
    scenes = batches.sample_scenes(count, rng)
    captions, attributes = zip(*(training_caption(scene, rng) for scene in scenes), strict=True)
    pixels = np.stack([render(scene, rng) for scene in scenes])
    return pixels, list(captions), torch.stack(attributes).half().numpy()


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> Tensor:
    """Scaled latents of images, (n, 4, 16, 16) float16 on the CPU."""
    parts = []
    for part in np.split(pixels, range(64, len(pixels), 64)):
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = vae.encode(batches.to_tensor(part).to(vae.device) * 2 - 1).latent_dist.mode()
        parts.append((latents.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    work: Path,
    seed: int,
    schedule: Schedule = SCHEDULE,
    last_schedule: Schedule = LAST_SCHEDULE,
    images: int = TRAINING_IMAGES,
) -> None:
    """Train UNet and text encoder in place on velocity prediction (Salimans and Ho 2022); the autoencoder is frozen.

    The weight of a timestep is min(1, 6 / (1 + SNR)): compared with min-SNR weights on epsilon, noisy timesteps, in which
    the layout is decided, count far more.
    """
    device = unet.device
    made = training_images(vae, tokenizer, images, seed, work / "images")
    latents, captions, attributes = (each.to(device) for each in made)
    rich = attributes[:, 0].isnan().nonzero().flatten()
    reader = Reader(text_encoder.config.hidden_size, end_token(tokenizer)).to(device)
    empty = tokenize(tokenizer, [""], device)
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    timesteps = scheduler.config.num_train_timesteps

    def loss_at(rng: np.random.Generator, batch: int, foreign_fraction: float) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(latents), size=batch)).to(device)
        captioned = chosen.clone()  # the image whose caption is shown
        is_foreign = torch.from_numpy(rng.random(batch) < foreign_fraction).to(device)
        if len(rich):
            captioned[is_foreign] = rich[torch.from_numpy(rng.integers(len(rich), size=batch)).to(device)[is_foreign]]
        is_empty = torch.from_numpy(rng.random(batch) < EMPTY_FRACTION).to(device)
        ids = torch.where(is_empty[:, None], empty, captions[captioned].long())
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        # Stratified timesteps, one from each of B equal intervals: less variance than independent draws.
        fractions = (np.arange(batch) + rng.random(batch)) / batch
        noisy_part = NOISY_FROM + (1 - NOISY_FROM) * (fractions - 1 + NOISY_FRACTION) / NOISY_FRACTION
        fractions = np.where(fractions < 1 - NOISY_FRACTION, fractions / (1 - NOISY_FRACTION), noisy_part)
        timestep = torch.from_numpy((fractions * timesteps).astype(np.int64)).to(device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        states = text_encoder(ids).last_hidden_state
        predicted = unet(noisy, timestep, states).sample.float()
        error = predicted - scheduler.get_velocity(clean, noise, timestep)
        weight = (MAX_WEIGHT * (1 - alphas[timestep])).clamp(max=1.0)  # 1 / (1 + SNR) = 1 - alpha
        is_read = ~is_empty & ~attributes[captioned, 0].isnan()
        reading = reader.loss(states[is_read], ids[is_read], attributes[captioned][is_read]).sum() / batch
        return (error.square().mean((1, 2, 3)) * weight).mean() + READING_WEIGHT * reading

    modules = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder, "reader": reader})
    by_adamw = nn.ModuleList([text_encoder, reader])
    snapshots = {max(1, int(part * schedule.steps)): stage_file(work, part) for part in STAGES[:-1]}
    fit(
        "unet",
        modules,
        partial(loss_at, batch=schedule.batch, foreign_fraction=0.0),
        schedule,
        work / "unet.pt",
        seed,
        by_adamw,
        snapshots,
    )
    last = partial(loss_at, batch=last_schedule.batch, foreign_fraction=FOREIGN_FRACTION)
    snapshots = {last_schedule.steps: stage_file(work, STAGES[-1])}
    fit("unet_last", modules, last, last_schedule, work / "unet_last.pt", seed, by_adamw, snapshots)


def stage_file(work: Path, part: float) -> Path:
    """The averaged weights of UNet and text encoder after a part of the training."""
    return work / f"base_{round(100 * part):03d}.safetensors"


def load_stage(path: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Load a file of `train_unet` into a UNet and a text encoder of the same shape."""
    weights = load_file(path)
    for name, module in (("unet", unet), ("text_encoder", text_encoder)):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        missing = module.load_state_dict(own, strict=False).missing_keys
        assert not set(missing) & {key for key, _ in module.named_parameters()}, missing
