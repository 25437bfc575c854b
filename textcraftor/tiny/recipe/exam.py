"""Measures what lies on the shelf, through the same stock loaders that users have."""

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
from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.aesthetic import Beholder, exhibition
from textcraftor.tiny.recipe.fit import generator
from textcraftor.tiny.recipe.preferences import GROUP_H, GROUP_P, pair_accuracy
from textcraftor.tiny.recipe.tokenizer import new_tokenizer
from textcraftor.tiny.recipe.towers import HuggingFaceTowers, OpenClipTowers, Towers, cosine, standardised, tokenized
from textcraftor.tiny.scenes import change_one

STEPS: Final = 25
GUIDANCE_SCALE: Final = 7.5
PROMPT_SEED: Final = 20_000  # far from every seed of the recipe
RICH_FRACTION: Final = 0.6


@dataclass(frozen=True, slots=True)
class Report:
    """Every figure of the model card.

    overall, plain, rich: claim accuracy by kind of the base's pictures; chance: of pictures made for other prompts.
    vae_mse: on images in [-1, 1]; vae_oracle: claim accuracy on reconstructions.
    pairs, twins, retrieval: by reward name; aesthetic_correlation: with the public's score.
    """

    images: Tensor
    prompts: list[str]
    plain_count: int  # the last ones of the prompts
    chance: float
    overall: dict[str, float]
    plain: dict[str, float]
    rich: dict[str, float]
    vae_mse: float
    vae_oracle: float
    pairs: dict[str, float]
    twins: dict[str, float]
    retrieval: dict[str, float]
    aesthetic_correlation: float


@torch.no_grad()
def generate(pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance_scale: float, batch: int = 64) -> Tensor:
    """Pictures of prompts, (B, 3, 64, 64) in [0, 1]; the n-th prompt's noise comes from seed n."""
    parts = []
    for start in range(0, len(prompts), batch):
        said = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(said))]
        drawn = pipeline(
            said, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=noise, output_type="pt"
        ).images
        parts.append(drawn.float().cpu())
    return torch.cat(parts)


def load_towers(out: Path, device: torch.device) -> dict[str, Towers]:
    """The text-aware rewards, by name."""
    loaded: dict[str, Towers] = {}
    for name in ("clip", "hpsv2", "heldout"):
        model = open_clip.create_model(f"local-dir:{out / 'rewards' / name}")
        loaded[name] = OpenClipTowers(model)
    loaded["pickscore"] = HuggingFaceTowers(CLIPModel.from_pretrained(out / "rewards/pickscore", dtype=torch.float32))
    return {name: pair.to(device).eval().requires_grad_(False) for name, pair in loaded.items()}


def load_beholder(out: Path) -> Beholder:
    """The aesthetic reward."""
    beholder = Beholder()
    folder = out / "rewards/aesthetic"
    beholder.tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    head = load_file(folder / "head.safetensors")
    beholder.layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in head.items()})
    return beholder.float().eval()


@torch.no_grad()
def twin_accuracy(towers: Towers, tokenizer: CLIPTokenizer, device: torch.device, count: int = 512) -> float:
    """How often a picture is nearer to its own rich caption than to that of a twin with one attribute changed."""
    rng = generator(PROMPT_SEED, "twins")
    batch = corpus.scenes(count, rng)
    images = corpus.pictures(batch, rng).to(device)
    own = corpus.captions(batch, rng, RICH_FRACTION)
    other = corpus.captions([change_one(scene, rng) for scene in batch], rng, RICH_FRACTION)
    near, far = (cosine(towers, images, tokenized(tokenizer, said, device)) for said in (own, other))
    return (near > far).float().mean().item()


@torch.no_grad()
def retrieval_accuracy(towers: Towers, tokenizer: CLIPTokenizer, device: torch.device, count: int = 128) -> float:
    """How often a picture finds its own caption among `count`."""
    rng = generator(PROMPT_SEED, "retrieval")
    batch = corpus.scenes(count, rng)
    seen = F.normalize(towers.encode_image(standardised(corpus.pictures(batch, rng).to(device))), dim=-1)
    ids = tokenized(tokenizer, corpus.captions(batch, rng, RICH_FRACTION), device)
    said = F.normalize(towers.encode_text(ids), dim=-1)
    return (seen @ said.T).argmax(1).cpu().eq(torch.arange(count)).float().mean().item()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, count: int = 512) -> tuple[float, float]:
    """Mean squared error on [-1, 1], and the oracle's claim accuracy on reconstructions."""
    rng = generator(PROMPT_SEED, "reconstruction")
    batch = corpus.scenes(count, rng)
    images = corpus.pictures(batch, rng).to(vae.device)
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(64)]
    decoded = torch.cat(parts) / 2 + 0.5
    error = F.mse_loss(decoded, images).item() * 4
    return error, Oracle().accuracy(decoded, corpus.captions(batch, rng, rich=0.0))["all"]


@torch.no_grad()
def examine(out: Path, device: torch.device, count: int = 512) -> Report:
    """All figures, on prompts and scenes that no step of the recipe saw."""
    tokenizer = new_tokenizer()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "base", dtype=torch.float32, safety_checker=None)
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    rich_count = round(count * RICH_FRACTION)
    rich = sample_prompts(rich_count, PROMPT_SEED, 1.0)
    plain = sample_prompts(count - rich_count, PROMPT_SEED + 1, 0.0)
    images = generate(pipeline, rich + plain, GUIDANCE_SCALE)
    oracle = Oracle()
    vae_mse, vae_oracle = reconstruct(pipeline.vae)
    towers = load_towers(out, device)
    tastes = {"pickscore": GROUP_P, "hpsv2": GROUP_H}
    shown, scores = exhibition(count, generator(PROMPT_SEED, "exhibition"), torch.device("cpu"))
    liked = load_beholder(out)(shown)
    return Report(
        images=images,
        prompts=rich + plain,
        plain_count=len(plain),
        chance=oracle.accuracy(images.roll(1, 0), rich + plain)["all"],
        overall=oracle.accuracy(images, rich + plain),
        plain=oracle.accuracy(images[rich_count:], plain),
        rich=oracle.accuracy(images[:rich_count], rich),
        vae_mse=vae_mse,
        vae_oracle=vae_oracle,
        pairs={
            name: pair_accuracy(towers[name], tokenizer, taste, PROMPT_SEED, pipeline.vae, count)
            for name, taste in tastes.items()
        },
        twins={name: twin_accuracy(pair, tokenizer, device, count) for name, pair in towers.items()},
        retrieval={name: retrieval_accuracy(pair, tokenizer, device) for name, pair in towers.items()},
        aesthetic_correlation=torch.corrcoef(torch.stack([liked, scores]))[0, 1].item(),
    )
