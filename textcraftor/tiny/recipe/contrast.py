"""Contrastive training: which sentence belongs to which picture, with twins that differ in one attribute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.damage import damage
from textcraftor.tiny.recipe.fit import Schedule, fit
from textcraftor.tiny.recipe.towers import EMBEDDING, Towers, standardised, tokenized
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, SIZES, STYLES, Scene

SCHEDULE = Schedule(steps=1000, batch=64, peak_lr=1.5e-3, ema=0.99, save_every=50)
SETTLING = Schedule(steps=250, batch=64, peak_lr=4e-4, ema=0.99, save_every=50)
FACTS = len(COLOURS) * (len(SHAPES) + len(SIZES) + len(RELATIONS)) + len(BACKGROUNDS) + len(STYLES)


@dataclass(frozen=True, slots=True)
class Diet:
    """What a model learns from: how many captions are rich, and how many of those are wrong."""

    rich: float = 0.6
    wrong: float = 0.0


def facts(batch: Sequence[Scene]) -> Tensor:
    """A scene as a list of yes and no, (B, FACTS): which colour has which shape, size and side; background; style."""
    table = torch.zeros(len(batch), FACTS)
    pairs = len(SHAPES) + len(SIZES) + len(RELATIONS)
    for row, scene in zip(table, batch, strict=True):
        sides = (scene.relation, OPPOSITE[scene.relation] if scene.relation else None)
        for thing, side in zip(scene.things, sides, strict=False):
            start = COLOURS.index(thing.colour or "") * pairs
            row[start + SHAPES.index(thing.shape or "")] = 1
            row[start + len(SHAPES) + SIZES.index(thing.size or "")] = 1
            if side:
                row[start + len(SHAPES) + len(SIZES) + RELATIONS.index(side)] = 1
        row[len(COLOURS) * pairs + BACKGROUNDS.index(scene.background)] = 1
        row[len(COLOURS) * pairs + len(BACKGROUNDS) + STYLES.index(scene.style)] = 1
    return table


class Lesson(nn.Module):
    """Towers, the temperature of their contrast, and a reader of facts that both encoders must satisfy.

    The reader is shared and thrown away afterwards.  Contrast alone needs hundreds of thousands of pictures before it
    looks at shapes; asked for the facts, the embedding holds them after tens of thousands.
    """

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers
        self.reader = nn.Linear(EMBEDDING, FACTS)
        self.scale = nn.Parameter(torch.tensor(2.7))  # log; e^2.7 is CLIP's usual start

    def forward(self, images: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
        """Loss of a batch.  images: (B, 3, 64, 64) in [0, 1]; ids: (B, 40); truth: (B, FACTS)."""
        seen = self.towers.encode_image(standardised(images)).float()
        said = self.towers.encode_text(ids).float()
        logits = self.scale.clamp(max=4.6).exp() * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T
        target = torch.arange(len(images), device=images.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        reading = sum(F.binary_cross_entropy_with_logits(self.reader(features).float(), truth) for features in (seen, said))
        return contrast + 5 * reading

    @property
    def log_scale(self) -> float:
        """The learned log temperature, what a CLIP calls `logit_scale`."""
        return self.scale.clamp(max=4.6).item()


def train_contrast(
    label: str,
    lesson: Lesson,
    tokenizer: CLIPTokenizer,
    diet: Diet,
    checkpoint: Path,
    seed: int,
    vae: AutoencoderKL | None = None,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Train a lesson's towers in place.  vae: if given, some pictures pass through its latents."""
    device = lesson.scale.device

    def loss_at(rng: np.random.Generator) -> Tensor:
        batch = corpus.twins(schedule.batch, rng)
        images = damage(corpus.pictures(batch, rng).to(device), rng, vae)
        said = corpus.captions(batch, rng, diet.rich, diet.wrong)
        loss: Tensor = lesson(images, tokenized(tokenizer, said, device), facts(batch).to(device))
        return loss

    fit(label, lesson, loss_at, schedule, checkpoint, seed)
