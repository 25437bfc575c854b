"""Measures the exported models on new prompts and scenes, through the stock loaders that users have."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from textcraftor.tiny.language import sample_prompts
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.aesthetic import AestheticModel, sample_rated_images
from textcraftor.tiny.recipe.fit import generator
from textcraftor.tiny.recipe.preferences import GROUP_H, GROUP_P, preference_accuracy
from textcraftor.tiny.recipe.tokenizer import new_tokenizer
from textcraftor.tiny.recipe.towers import HuggingFaceTowers, OpenClipTowers, Towers, cosine, normalize, tokenize
from textcraftor.tiny.scenes import change_one_attribute

STEPS: Final = 25
GUIDANCE_SCALE: Final = 7.5
PROMPT_SEED: Final = 20_000  # far from every seed of the recipe
RICH_FRACTION: Final = 0.6


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """Every figure of the model card.

    images: (B, 3, 64, 64) in [0, 1], drawn by the base for `prompts`, of which the last `plain_count` are plain.
    overall, plain, rich: fraction of claims that hold in those images, by kind.  chance: the same for images of other
    prompts.  vae_mse: on images in [-1, 1].  vae_claims: fraction of claims that hold in reconstructions.
    hard_negatives, retrieval, preferences: accuracy by reward name.
    aesthetic_correlation: Pearson's, with the synthetic ratings.
    """

    images: Tensor
    prompts: list[str]
    plain_count: int
    chance: float
    overall: dict[str, float]
    plain: dict[str, float]
    rich: dict[str, float]
    vae_mse: float
    vae_claims: float
    hard_negatives: dict[str, float]
    retrieval: dict[str, float]
    preferences: dict[str, float]
    aesthetic_correlation: float


@torch.no_grad()
def generate(pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance_scale: float, batch: int = 64) -> Tensor:
    """Images of prompts, (B, 3, 64, 64) float32 in [0, 1] on the CPU; the noise of prompt n has seed n."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
        images = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=noise, output_type="pt"
        ).images
        parts.append(images.float().cpu())
    return torch.cat(parts)


def load_towers(out: Path, device: torch.device) -> dict[str, Towers]:
    """The rewards that read the prompt, by name."""
    loaded: dict[str, Towers] = {}
    for name in ("clip", "hpsv2", "heldout"):
        loaded[name] = OpenClipTowers(open_clip.create_model(f"local-dir:{out / 'rewards' / name}"))
    loaded["pickscore"] = HuggingFaceTowers(CLIPModel.from_pretrained(out / "rewards/pickscore", dtype=torch.float32))
    return {name: towers.to(device).eval().requires_grad_(False) for name, towers in loaded.items()}


def load_aesthetic(out: Path) -> AestheticModel:
    """The aesthetic reward."""
    model = AestheticModel()
    folder = out / "rewards/aesthetic"
    model.tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    head = load_file(folder / "head.safetensors")
    model.layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in head.items()})
    return model.float().eval()


# The strings below are part of the seeds: another word means other scenes and other figures.


@torch.no_grad()
def hard_negative_accuracy(towers: Towers, tokenizer: CLIPTokenizer, device: torch.device, count: int = 512) -> float:
    """How often an image is closer to its own caption than to one of the same scene with one attribute changed."""
    rng = generator(PROMPT_SEED, "twins")
    scenes = batches.sample_scenes(count, rng)
    images = batches.render_batch(scenes, rng).to(device)
    captions = batches.sample_captions(scenes, rng, RICH_FRACTION)
    negatives = batches.sample_captions([change_one_attribute(scene, rng) for scene in scenes], rng, RICH_FRACTION)
    positive, negative = (cosine(towers, images, tokenize(tokenizer, texts, device)) for texts in (captions, negatives))
    return (positive > negative).float().mean().item()


@torch.no_grad()
def retrieval_accuracy(towers: Towers, tokenizer: CLIPTokenizer, device: torch.device, count: int = 128) -> float:
    """How often an image's nearest caption among `count` is its own."""
    rng = generator(PROMPT_SEED, "retrieval")
    scenes = batches.sample_scenes(count, rng)
    image_features = F.normalize(towers.encode_image(normalize(batches.render_batch(scenes, rng).to(device))), dim=-1)
    ids = tokenize(tokenizer, batches.sample_captions(scenes, rng, RICH_FRACTION), device)
    text_features = F.normalize(towers.encode_text(ids), dim=-1)
    return (image_features @ text_features.T).argmax(1).cpu().eq(torch.arange(count)).float().mean().item()


@torch.no_grad()
def measure_reconstruction(vae: AutoencoderKL, count: int = 512) -> tuple[float, float]:
    """Mean squared error of reconstructions on [-1, 1], and the fraction of claims that hold in them."""
    rng = generator(PROMPT_SEED, "reconstruction")
    scenes = batches.sample_scenes(count, rng)
    images = batches.render_batch(scenes, rng).to(vae.device)
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(64)]
    decoded = torch.cat(parts) / 2 + 0.5
    error = F.mse_loss(decoded, images).item() * 4
    return error, Oracle().accuracy(decoded, batches.sample_captions(scenes, rng, rich=0.0))["all"]


@torch.no_grad()
def validate(out: Path, device: torch.device, count: int = 512) -> ValidationReport:
    """Measure the models in `out` on `count` prompts, and on scenes, that no step of the recipe has seen."""
    tokenizer = new_tokenizer()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "base", dtype=torch.float32, safety_checker=None)
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    rich_count = round(count * RICH_FRACTION)
    rich = sample_prompts(rich_count, PROMPT_SEED, 1.0)
    plain = sample_prompts(count - rich_count, PROMPT_SEED + 1, 0.0)
    images = generate(pipeline, rich + plain, GUIDANCE_SCALE)
    oracle = Oracle()
    vae_mse, vae_claims = measure_reconstruction(pipeline.vae, count)
    towers = load_towers(out, device)
    groups = {"pickscore": GROUP_P, "hpsv2": GROUP_H}
    rated, ratings = sample_rated_images(count, generator(PROMPT_SEED, "exhibition"), torch.device("cpu"))
    predicted = load_aesthetic(out)(rated)
    return ValidationReport(
        images=images,
        prompts=rich + plain,
        plain_count=len(plain),
        chance=oracle.accuracy(images.roll(1, 0), rich + plain)["all"],
        overall=oracle.accuracy(images, rich + plain),
        plain=oracle.accuracy(images[rich_count:], plain),
        rich=oracle.accuracy(images[:rich_count], rich),
        vae_mse=vae_mse,
        vae_claims=vae_claims,
        preferences={
            name: preference_accuracy(towers[name], tokenizer, group, PROMPT_SEED, pipeline.vae, count)
            for name, group in groups.items()
        },
        hard_negatives={name: hard_negative_accuracy(pair, tokenizer, device, count) for name, pair in towers.items()},
        retrieval={name: retrieval_accuracy(pair, tokenizer, device) for name, pair in towers.items()},
        aesthetic_correlation=torch.corrcoef(torch.stack([predicted, ratings]))[0, 1].item(),
    )
