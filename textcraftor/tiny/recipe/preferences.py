"""Two groups of synthetic annotators, and rewards that learn to choose as they do.

An annotator sees two pictures for one prompt.  He knows what was rendered, not what anyone measured: his liking is the
share of the prompt's claims that hold, plus his group's taste, and now and then he errs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.contrast import Diet, Lesson, facts
from textcraftor.tiny.recipe.damage import damage
from textcraftor.tiny.recipe.fit import Schedule, fit, generator
from textcraftor.tiny.recipe.towers import Towers, cosine, tokenized
from textcraftor.tiny.scenes import Scene, change_one

SCHEDULE = Schedule(steps=300, batch=48, peak_lr=4e-4, ema=0.99, save_every=50)
FIDELITY = 8.0  # weight of the claims, in units of the annotators' own noise
BLUNDER = 0.05  # share of choices made at random


@dataclass(frozen=True, slots=True)
class Taste:
    """What a group likes beside fidelity, in units of its own noise: gloss, a background, pictures without flaws."""

    gloss: float
    ground: str
    liking: float
    sharpness: float


GROUP_P = Taste(gloss=0.8, ground="white", liking=0.5, sharpness=12.0)
GROUP_H = Taste(gloss=0.3, ground="black", liking=0.8, sharpness=20.0)


def fidelity(shown: Scene, asked: Scene) -> float:
    """Share of the asked scene's attributes that the shown scene has; both list their things in the same order."""

    def attributes(scene: Scene) -> list[str | None]:
        things = [word for thing in scene.things for word in (thing.colour, thing.shape, thing.size)]
        return [*things, scene.background, scene.style, *([scene.relation] if scene.relation else [])]

    pairs = list(zip(attributes(shown), attributes(asked), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


@dataclass(frozen=True, slots=True)
class Ballot:
    """Pairs of pictures (B, 2, 3, 64, 64), what was asked for, and which of the two was chosen (B,)."""

    images: Tensor
    asked: list[Scene]
    chosen: Tensor


def _strayed(scene: Scene, rng: np.random.Generator) -> Scene:
    for _ in range(int(rng.choice(4, p=(0.3, 0.35, 0.2, 0.15)))):
        scene = change_one(scene, rng)
    return scene


def hold_ballot(
    taste: Taste, count: int, rng: np.random.Generator, device: torch.device, vae: AutoencoderKL | None = None
) -> Ballot:
    """Show `count` annotators of one group two pictures each and let them choose."""
    asked = corpus.scenes(count, rng)
    shown = [_strayed(scene, rng) for scene in asked for _ in range(2)]
    clean = corpus.pictures(shown, rng).to(device)
    images = damage(clean, rng, vae)
    flaws = (images - clean).abs().mean((1, 2, 3)).cpu().numpy()

    def utility(index: int) -> float:
        scene = shown[index]
        pleasure = taste.gloss * (scene.style == "glossy") + taste.liking * (scene.background == taste.ground)
        return float(FIDELITY * fidelity(scene, asked[index // 2]) + pleasure - taste.sharpness * flaws[index])

    lead = np.asarray([utility(2 * i + 1) - utility(2 * i) for i in range(count)])
    second = rng.random(count) < 1 / (1 + np.exp(-2 * lead))
    blunder = rng.random(count) < BLUNDER
    chosen = np.where(blunder, rng.integers(0, 2, count), second)
    return Ballot(images.view(count, 2, *images.shape[1:]), asked, torch.from_numpy(chosen.astype(np.int64)).to(device))


def pair_scores(towers: Towers, tokenizer: CLIPTokenizer, ballot: Ballot, prompts: Sequence[str]) -> Tensor:
    """Cosine of both pictures of each pair with their prompt, (B, 2)."""
    ids = tokenized(tokenizer, prompts, ballot.images.device).repeat_interleave(2, 0)
    return cosine(towers, ballot.images.flatten(0, 1), ids).view(-1, 2)


def train_preferences(
    label: str,
    lesson: Lesson,
    tokenizer: CLIPTokenizer,
    taste: Taste,
    checkpoint: Path,
    seed: int,
    vae: AutoencoderKL | None = None,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Fine-tune a contrastively trained lesson's towers on one group's choices, in place.

    A share of contrastive learning stays in the mix, or the towers forget what no pair of a ballot asks about.
    """
    device, diet = lesson.scale.device, Diet()

    def loss_at(rng: np.random.Generator) -> Tensor:
        ballot = hold_ballot(taste, schedule.batch // 2, rng, device, vae)
        prompts = corpus.captions(ballot.asked, rng, diet.rich)
        logits = lesson.scale.clamp(max=4.6).exp() * pair_scores(lesson.towers, tokenizer, ballot, prompts)
        batch = corpus.twins(schedule.batch, rng)
        images = damage(corpus.pictures(batch, rng).to(device), rng)
        said = tokenized(tokenizer, corpus.captions(batch, rng, diet.rich), device)
        contrast: Tensor = lesson(images, said, facts(batch).to(device))
        return F.cross_entropy(logits, ballot.chosen) + 0.5 * contrast

    fit(label, lesson, loss_at, schedule, checkpoint, seed)


@torch.no_grad()
def pair_accuracy(
    towers: Towers, tokenizer: CLIPTokenizer, taste: Taste, seed: int, vae: AutoencoderKL | None, count: int = 512
) -> float:
    """How often the model prefers what a fresh group of annotators prefers; they agree with each other far from always."""
    rng = generator(seed, "pair accuracy")
    ballot = hold_ballot(taste, count, rng, next(towers.parameters()).device, vae)
    scores = pair_scores(towers, tokenizer, ballot, corpus.captions(ballot.asked, rng, 0.75))
    return float((scores.argmax(1) == ballot.chosen).float().mean())
