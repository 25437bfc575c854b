"""Measures the exported models on new prompts and scenes, through the stock loaders that users have."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from textcraftor.tiny.language import sample_prompts
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.aesthetic import AestheticModel, sample_rated_images
from textcraftor.tiny.recipe.agreement import (
    IMAGES_PER_PROMPT,
    LARGE_DIFFERENCE,
    pair_agreement,
    within_prompt_correlation,
)
from textcraftor.tiny.recipe.drawings import draw
from textcraftor.tiny.recipe.fit import generator
from textcraftor.tiny.recipe.tokenizer import new_tokenizer
from textcraftor.tiny.recipe.towers import HuggingFaceTowers, OpenClipTowers, Towers, cosine, normalize, tokenize
from textcraftor.tiny.scenes import change_one_attribute

STEPS: Final = 15
GUIDANCE_SCALE: Final = 5.0
PROMPT_SEED: Final = 20_000  # far from every seed of the recipe
RICH_FRACTION: Final = 0.6
RETRIEVED: Final = 128  # captions among which an image finds its own


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """Every figure of the model card.

    images: (B, 3, 64, 64) in [0, 1], drawn by the base for `prompts`, of which the last `plain_count` are plain.
    overall, plain, rich: fraction of claims that hold in those images, by kind.  chance: the same for images of other
    prompts.  vae_mse: on images in [-1, 1].  vae_claims: fraction of claims that hold in reconstructions.
    hard_negatives, retrieval: accuracy by reward name.  agreement: with the oracle on pairs of drawn images of one prompt,
    all and those with a large difference, by reward name.  aesthetic_correlation: Pearson's, with the synthetic ratings.
    aesthetic_and_oracle: Pearson's within prompts.
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
    agreement: dict[str, tuple[float, float]]
    aesthetic_correlation: float
    aesthetic_and_oracle: float


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
def retrieval_accuracy(towers: Towers, tokenizer: CLIPTokenizer, device: torch.device, count: int = RETRIEVED) -> float:
    """How often an image's nearest caption among `count` is its own."""
    rng = generator(PROMPT_SEED, "retrieval")
    scenes = batches.sample_scenes(count, rng)
    image_features = F.normalize(towers.encode_image(normalize(batches.render_batch(scenes, rng).to(device))), dim=-1)
    ids = tokenize(tokenizer, batches.sample_captions(scenes, rng, RICH_FRACTION), device)
    text_features = F.normalize(towers.encode_text(ids), dim=-1)
    return (image_features @ text_features.T).argmax(1).cpu().eq(torch.arange(count)).float().mean().item()


@torch.no_grad()
def generate(pipeline: StableDiffusionPipeline, prompts: Sequence[str], images: int = 1, batch: int = 64) -> Tensor:
    """Images of prompts, (P, images, 3, 64, 64) float32 in [0, 1] on the CPU; prompt n starts from the seeds n * images + k."""
    seeds = range(len(prompts) * images)
    texts = [prompt for prompt in prompts for _ in range(images)]
    parts = [
        draw(pipeline, texts[start : start + batch], GUIDANCE_SCALE, seeds[start : start + batch], STEPS)
        for start in track(range(0, len(texts), batch), description="images")
    ]
    return torch.cat(parts).view(len(prompts), images, 3, 64, 64)


@torch.no_grad()
def reward_scores(towers: Towers, tokenizer: CLIPTokenizer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward's cosine of each image with its prompt, (P, K).  images: (P, K, 3, 64, 64) in [0, 1]."""
    device = next(towers.parameters()).device
    ids = tokenize(tokenizer, prompts, device)
    return torch.stack([cosine(towers, images[:, n].to(device), ids).cpu() for n in range(images.shape[1])], 1)


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
    prompts = rich + plain
    drawn = generate(pipeline, prompts, IMAGES_PER_PROMPT)
    images = drawn[:, 0]
    oracle = Oracle()
    truth = torch.stack([oracle.score(drawn[:, n], prompts) for n in range(IMAGES_PER_PROMPT)], 1)
    vae_mse, vae_claims = measure_reconstruction(pipeline.vae, count)
    towers = load_towers(out, device)
    rated, ratings = sample_rated_images(count, generator(PROMPT_SEED, "exhibition"), torch.device("cpu"))
    aesthetic = load_aesthetic(out)
    scores = {name: reward_scores(pair, tokenizer, drawn, prompts) for name, pair in towers.items()}
    return ValidationReport(
        images=images,
        prompts=prompts,
        plain_count=len(plain),
        chance=oracle.accuracy(images.roll(1, 0), prompts)["all"],
        overall=oracle.accuracy(images, prompts),
        plain=oracle.accuracy(images[rich_count:], plain),
        rich=oracle.accuracy(images[:rich_count], rich),
        vae_mse=vae_mse,
        vae_claims=vae_claims,
        agreement={
            name: (pair_agreement(table, truth), pair_agreement(table, truth, LARGE_DIFFERENCE))
            for name, table in scores.items()
        },
        hard_negatives={name: hard_negative_accuracy(pair, tokenizer, device, count) for name, pair in towers.items()},
        retrieval={name: retrieval_accuracy(pair, tokenizer, device, min(count, RETRIEVED)) for name, pair in towers.items()},
        aesthetic_correlation=torch.corrcoef(torch.stack([aesthetic(rated), ratings]))[0, 1].item(),
        aesthetic_and_oracle=within_prompt_correlation(
            torch.stack([aesthetic(drawn[:, n]) for n in range(IMAGES_PER_PROMPT)], 1), truth
        ),
    )
