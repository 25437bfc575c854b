"""Rewards fine-tuned on the choices of two groups of synthetic annotators, as PickScore and HPSv2 are on people's.

An annotator sees two images for one prompt and tends to choose the one with the higher utility: the fraction of the
prompt's claims that it shows, plus what the annotator's group likes. Half of the pairs are rendered, and their utility
is computed from the scenes; the others were drawn by the base, where an annotator looks at the pixels and misreads a claim
now and then. A few choices are random.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.contrastive import CaptionMix, ContrastiveTask, contrastive_loss
from textcraftor.tiny.recipe.degradation import degrade
from textcraftor.tiny.recipe.drawings import Drawings
from textcraftor.tiny.recipe.fit import Schedule, fit
from textcraftor.tiny.recipe.towers import Towers, cosine, tokenize
from textcraftor.tiny.scenes import Scene, change_one_attribute

SCHEDULE = Schedule(steps=500, batch=48, peak_lr=4e-4, ema=0.99, save_every=50)
FIDELITY_WEIGHT = 8.0  # in units of the annotators' own noise
ERROR_RATE = 0.05  # fraction of choices made at random
MISREAD = 0.05  # probability with which an annotator misreads a claim in a drawn image
CONTRASTIVE_WEIGHT = 0.5
RICH_FRACTION = 0.6  # of the captions of rendered pairs


@dataclass(frozen=True, slots=True)
class AnnotatorGroup:
    """What a group likes beside fidelity to the prompt, in units of its own noise.

    gloss: utility of the glossy style.  background: the favourite one, and background_bonus: its utility.
    flaw_penalty: utility lost per unit of mean absolute difference from the clean render.
    """

    gloss: float
    background: str
    background_bonus: float
    flaw_penalty: float

    def taste(self, style: str, background: str | None) -> float:
        """The utility of what an image shows, whatever the prompt."""
        return self.gloss * (style == "glossy") + self.background_bonus * (background == self.background)


GROUP_P = AnnotatorGroup(gloss=0.8, background="white", background_bonus=0.5, flaw_penalty=12.0)
GROUP_H = AnnotatorGroup(gloss=0.3, background="black", background_bonus=0.8, flaw_penalty=20.0)


def fidelity(shown: Scene, requested: Scene) -> float:
    """Fraction of the requested scene's attributes that the shown scene has.  Both list their objects in the same order."""

    def attributes(scene: Scene) -> list[str | None]:
        words = [word for obj in scene.objects for word in (obj.colour, obj.shape, obj.size)]
        return [*words, scene.background, scene.style, *([scene.relation] if scene.relation else [])]

    pairs = list(zip(attributes(shown), attributes(requested), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """Pairs of images (B, 2, 3, 64, 64), their B prompts, and the index of the image that an annotator chose, (B,)."""

    images: Tensor
    prompts: list[str]
    chosen: Tensor


def _perturb(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change up to three attributes, as a text-to-image model errs."""
    for _ in range(int(rng.choice(4, p=(0.3, 0.35, 0.2, 0.15)))):
        scene = change_one_attribute(scene, rng)
    return scene


def _choose(utilities: NDArray[np.float64], rng: np.random.Generator) -> Tensor:
    """The index of the image that each annotator chooses, (B,).  utilities: (B, 2) in units of the annotators' noise."""
    second = rng.random(len(utilities)) < 1 / (1 + np.exp(2 * (utilities[:, 0] - utilities[:, 1])))
    is_error = rng.random(len(utilities)) < ERROR_RATE
    return torch.from_numpy(np.where(is_error, rng.integers(0, 2, len(utilities)), second).astype(np.int64))


def sample_rendered_pairs(
    group: AnnotatorGroup, count: int, rng: np.random.Generator, device: torch.device, vae: AutoencoderKL | None = None
) -> PreferencePairs:
    """Draw `count` preference pairs of rendered scenes that err as a text-to-image model does.  vae: passed to `degrade`."""
    requested = batches.sample_scenes(count, rng)
    shown = [_perturb(scene, rng) for scene in requested for _ in range(2)]
    clean = batches.render_batch(shown, rng).to(device)
    images = degrade(clean, rng, vae)
    flaws = (images - clean).abs().mean((1, 2, 3)).cpu().numpy()
    likes = np.asarray([FIDELITY_WEIGHT * fidelity(scene, requested[i // 2]) for i, scene in enumerate(shown)])
    tastes = np.asarray([group.taste(scene.style, scene.background) for scene in shown])
    utilities = (likes + tastes - group.flaw_penalty * flaws).reshape(count, 2)
    prompts = batches.sample_captions(requested, rng, RICH_FRACTION)
    return PreferencePairs(images.view(count, 2, *images.shape[1:]), prompts, _choose(utilities, rng).to(device))


def sample_drawn_pairs(
    group: AnnotatorGroup, drawings: Drawings, count: int, rng: np.random.Generator, device: torch.device
) -> PreferencePairs:
    """`count` preference pairs of images that the base drew, each of two random images of a random prompt."""
    rows = rng.integers(len(drawings.prompts), size=count)
    columns = np.stack([rng.permutation(drawings.images.shape[1])[:2] for _ in rows])
    utilities = np.asarray(
        [
            [
                FIDELITY_WEIGHT * drawings.fidelity(row, column, MISREAD, rng)
                + group.taste(drawings.style(row, column), drawings.detected[row][column].background)
                for column in pair
            ]
            for row, pair in zip(rows, columns, strict=True)
        ]
    )
    images = drawings.images[torch.from_numpy(rows)[:, None], torch.from_numpy(columns)].to(device).float() / 255
    return PreferencePairs(images, [drawings.prompts[row] for row in rows], _choose(utilities, rng).to(device))


def pair_scores(towers: Towers, tokenizer: CLIPTokenizer, pairs: PreferencePairs) -> Tensor:
    """Cosine of both images of each pair with the pair's prompt, (B, 2)."""
    ids = tokenize(tokenizer, pairs.prompts, pairs.images.device).repeat_interleave(2, 0)
    return cosine(towers, pairs.images.flatten(0, 1), ids).view(-1, 2)


def train_preferences(
    label: str,
    task: ContrastiveTask,
    tokenizer: CLIPTokenizer,
    group: AnnotatorGroup,
    checkpoint: Path,
    seed: int,
    drawings: Drawings,
    vae: AutoencoderKL | None = None,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Fine-tune the towers of a contrastively trained task on one group's choices, in place.

    The contrastive loss stays in the sum, or the towers forget what preference pairs do not test.
    """
    device = task.scale.device
    half = schedule.batch // 2

    def loss_at(rng: np.random.Generator) -> Tensor:
        contrastive = contrastive_loss(task, tokenizer, CaptionMix(), schedule.batch, rng, drawings)
        rendered = sample_rendered_pairs(group, half // 2, rng, device, vae)
        drawn = sample_drawn_pairs(group, drawings, half, rng, device)
        choices: Tensor = sum(
            (
                F.cross_entropy(task.logit_scale * pair_scores(task.towers, tokenizer, pairs), pairs.chosen)
                for pairs in (rendered, drawn)
            ),
            start=torch.zeros((), device=device),
        )
        return choices / 2 + CONTRASTIVE_WEIGHT * contrastive

    fit(label, task, loss_at, schedule, checkpoint, seed)
