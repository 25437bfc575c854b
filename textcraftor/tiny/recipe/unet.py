"""The UNet and the text encoder, trained together on mostly plain captions.

Every training image has one caption for good, as in a scraped data set; a few are rich, and half of those describe
another image. So the base draws what plain captions say and understands rich prompts only in part, and how much is
bounded by the data and not by the number of steps. Beside the denoising loss stands that of reading plain captions
(`textcraftor.tiny.recipe.reading`).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
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
from textcraftor.tiny.scenes import Scene, sample_scene

SCHEDULE = Schedule(steps=10_000, batch=64, peak_lr=1e-3, muon_lr=1.5e-3, decay=0.3, ema=0.999, save_every=200)
TRAINING_IMAGES = 131_072
CHUNK = 4096  # training images in a file of the cache
RICH_FRACTION, WRONG_FRACTION, EMPTY_FRACTION = 0.025, 0.5, 0.1
NOISY_FRACTION, NOISY_FROM = 0.5, 0.6  # half of the timesteps are among the last 40 %, in which the layout is decided
READING_WEIGHT = 0.007  # of the reading loss, a sum over all attributes
MAX_WEIGHT = 6.0
STAGES = (0.25, 0.55, 1.0)  # fractions of the training after which the base is kept, for the drawings that rewards learn from


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
    parts = []
    for start in track(range(0, count, CHUNK), description="training images"):
        path = cache / f"{start // CHUNK:03d}.safetensors"
        if not path.exists():
            rng = generator(seed, "unet images", start)
            scenes = batches.sample_scenes(min(CHUNK, count - start), rng)
            captions, attributes = zip(*(training_caption(scene, rng) for scene in scenes), strict=True)
            ids = tokenize(tokenizer, captions, torch.device("cpu")).short()
            latents = torch.cat([_encode(vae, scenes[i : i + 64], rng) for i in range(0, len(scenes), 64)])
            save_tensors({"latents": latents, "captions": ids, "attributes": torch.stack(attributes).half()}, path)
        parts.append(load_file(path))
    latents, ids, facts = (torch.cat([part[name] for part in parts]) for name in ("latents", "captions", "attributes"))
    return latents, ids, facts


@torch.no_grad()
def _encode(vae: AutoencoderKL, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    images = batches.render_batch(scenes, rng).to(vae.device)
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents: Tensor = vae.encode(images * 2 - 1).latent_dist.mode()
    return (latents.float() * vae.config.scaling_factor).half().cpu()


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    work: Path,
    seed: int,
    schedule: Schedule = SCHEDULE,
    images: int = TRAINING_IMAGES,
) -> None:
    """Train UNet and text encoder in place on velocity prediction (Salimans and Ho 2022); the autoencoder is frozen.

    The weight of a timestep is min(1, 6 / (1 + SNR)): compared with min-SNR weights on epsilon, noisy timesteps, in which
    the layout is decided, count far more.
    """
    device = unet.device
    made = training_images(vae, tokenizer, images, seed, work / "images")
    latents, captions, attributes = (each.to(device) for each in made)
    reader = Reader(text_encoder.config.hidden_size, end_token(tokenizer)).to(device)
    empty = tokenize(tokenizer, [""], device)
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    timesteps = scheduler.config.num_train_timesteps

    def loss_at(rng: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(latents), size=schedule.batch)).to(device)
        is_empty = torch.from_numpy(rng.random(schedule.batch) < EMPTY_FRACTION).to(device)
        ids = torch.where(is_empty[:, None], empty, captions[chosen].long())
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        # Stratified timesteps, one from each of B equal intervals: less variance than independent draws.
        fractions = (np.arange(schedule.batch) + rng.random(schedule.batch)) / schedule.batch
        noisy_part = NOISY_FROM + (1 - NOISY_FROM) * (fractions - 1 + NOISY_FRACTION) / NOISY_FRACTION
        fractions = np.where(fractions < 1 - NOISY_FRACTION, fractions / (1 - NOISY_FRACTION), noisy_part)
        timestep = torch.from_numpy((fractions * timesteps).astype(np.int64)).to(device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        states = text_encoder(ids).last_hidden_state
        predicted = unet(noisy, timestep, states).sample.float()
        error = predicted - scheduler.get_velocity(clean, noise, timestep)
        weight = (MAX_WEIGHT * (1 - alphas[timestep])).clamp(max=1.0)  # 1 / (1 + SNR) = 1 - alpha
        is_read = ~is_empty & ~attributes[chosen, 0].isnan()
        reading = reader.loss(states[is_read], ids[is_read], attributes[chosen][is_read]).sum() / schedule.batch
        return (error.square().mean((1, 2, 3)) * weight).mean() + READING_WEIGHT * reading

    modules = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder, "reader": reader})
    snapshots = {max(1, int(part * schedule.steps)): stage_file(work, part) for part in STAGES}
    fit("unet", modules, loss_at, schedule, work / "unet.pt", seed, nn.ModuleList([text_encoder, reader]), snapshots)


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
