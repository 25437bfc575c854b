"""Rewards fine-tuned on the choices of two groups of synthetic annotators, as PickScore and HPSv2 are on people's.

An annotator sees two images for one prompt and tends to choose the one with the higher utility: the fraction of the
prompt's attributes that it shows, plus what the annotator's group likes. The utility is computed from the rendered scenes,
not from pixels, and a few choices are random.
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

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.contrastive import CaptionMix, ContrastiveTask, scene_attributes
from textcraftor.tiny.recipe.degradation import degrade
from textcraftor.tiny.recipe.fit import Schedule, fit, generator
from textcraftor.tiny.recipe.towers import Towers, cosine, tokenize
from textcraftor.tiny.scenes import Scene, change_one_attribute

SCHEDULE = Schedule(steps=300, batch=48, peak_lr=4e-4, ema=0.99, save_every=50)
FIDELITY_WEIGHT = 8.0  # in units of the annotators' own noise
ERROR_RATE = 0.05  # fraction of choices made at random


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
    """Pairs of images (B, 2, 3, 64, 64), the B scenes that were requested, and the index of the chosen image, (B,)."""

    images: Tensor
    requested: list[Scene]
    chosen: Tensor


def _perturb(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change up to three attributes, as a text-to-image model errs."""
    for _ in range(int(rng.choice(4, p=(0.3, 0.35, 0.2, 0.15)))):
        scene = change_one_attribute(scene, rng)
    return scene


def sample_preferences(
    group: AnnotatorGroup, count: int, rng: np.random.Generator, device: torch.device, vae: AutoencoderKL | None = None
) -> PreferencePairs:
    """Draw `count` preference pairs of one group.  vae: passed to `degrade`."""
    requested = batches.sample_scenes(count, rng)
    shown = [_perturb(scene, rng) for scene in requested for _ in range(2)]
    clean = batches.render_batch(shown, rng).to(device)
    images = degrade(clean, rng, vae)
    flaws = (images - clean).abs().mean((1, 2, 3)).cpu().numpy()

    def utility(index: int) -> float:
        scene = shown[index]
        taste = group.gloss * (scene.style == "glossy") + group.background_bonus * (scene.background == group.background)
        return float(FIDELITY_WEIGHT * fidelity(scene, requested[index // 2]) + taste - group.flaw_penalty * flaws[index])

    margin = np.asarray([utility(2 * i + 1) - utility(2 * i) for i in range(count)])
    second = rng.random(count) < 1 / (1 + np.exp(-2 * margin))
    is_error = rng.random(count) < ERROR_RATE
    chosen = np.where(is_error, rng.integers(0, 2, count), second)
    pairs = images.view(count, 2, *images.shape[1:])
    return PreferencePairs(pairs, requested, torch.from_numpy(chosen.astype(np.int64)).to(device))


def pair_scores(towers: Towers, tokenizer: CLIPTokenizer, pairs: PreferencePairs, prompts: Sequence[str]) -> Tensor:
    """Cosine of both images of each pair with the pair's prompt, (B, 2)."""
    ids = tokenize(tokenizer, prompts, pairs.images.device).repeat_interleave(2, 0)
    return cosine(towers, pairs.images.flatten(0, 1), ids).view(-1, 2)


def train_preferences(
    label: str,
    task: ContrastiveTask,
    tokenizer: CLIPTokenizer,
    group: AnnotatorGroup,
    checkpoint: Path,
    seed: int,
    vae: AutoencoderKL | None = None,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Fine-tune the towers of a contrastively trained task on one group's choices, in place.

    The contrastive loss stays in the sum with weight 0.5, or the towers forget what preference pairs do not test.
    """
    device, captions = task.scale.device, CaptionMix()

    def loss_at(rng: np.random.Generator) -> Tensor:
        pairs = sample_preferences(group, schedule.batch // 2, rng, device, vae)
        prompts = batches.sample_captions(pairs.requested, rng, captions.rich)
        logits = task.logit_scale * pair_scores(task.towers, tokenizer, pairs, prompts)
        scenes = batches.sample_with_negatives(schedule.batch, rng)
        images = degrade(batches.render_batch(scenes, rng).to(device), rng)
        ids = tokenize(tokenizer, batches.sample_captions(scenes, rng, captions.rich), device)
        contrastive: Tensor = task(images, ids, scene_attributes(scenes).to(device))
        return F.cross_entropy(logits, pairs.chosen) + 0.5 * contrastive

    fit(label, task, loss_at, schedule, checkpoint, seed)


@torch.no_grad()
def preference_accuracy(
    towers: Towers, tokenizer: CLIPTokenizer, group: AnnotatorGroup, seed: int, vae: AutoencoderKL | None, count: int = 512
) -> float:
    """How often the model chooses as new annotators of the group do.  Annotators err, so 1.0 is out of reach."""
    rng = generator(seed, "pair accuracy")
    pairs = sample_preferences(group, count, rng, next(towers.parameters()).device, vae)
    scores = pair_scores(towers, tokenizer, pairs, batches.sample_captions(pairs.requested, rng, 0.75))
    return float((scores.argmax(1) == pairs.chosen).float().mean())
