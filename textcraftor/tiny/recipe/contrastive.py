"""Training of image-text towers: first on attributes alone, then by contrast (Radford et al. 2021) with hard negatives.

Contrast alone leaves towers of this size blind to which object is where and nearly blind to shapes: of two drawn images that
differ in one of them, all four judges chose by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.degradation import degrade
from textcraftor.tiny.recipe.drawings import Drawings, sample_described
from textcraftor.tiny.recipe.fit import Schedule, fit
from textcraftor.tiny.recipe.towers import EMBEDDING, Towers, normalize, tokenize
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, OPPOSITE_RELATION, RELATIONS, SHAPES, SIZES, STYLES, Scene

ATTRIBUTES_SCHEDULE = Schedule(steps=1500, batch=256, peak_lr=1e-3, decay=0.5, ema=0.99, save_every=50)
IMAGES_SCHEDULE = Schedule(steps=1000, batch=128, peak_lr=1e-3, muon_lr=1.5e-3, decay=0.4, ema=0.98, save_every=50)
SCHEDULE = Schedule(steps=1000, batch=64, peak_lr=1.5e-3, ema=0.99, save_every=50)
FINE_TUNING_SCHEDULE = Schedule(steps=500, batch=64, peak_lr=4e-4, ema=0.99, save_every=50)
ATTRIBUTES = len(COLOURS) * (len(SHAPES) + len(SIZES) + len(RELATIONS)) + len(BACKGROUNDS) + len(STYLES)
_PER_COLOUR = len(SHAPES) + len(SIZES) + len(RELATIONS)
# Indices of the attributes that say where an object is.
POSITIONS = tuple(
    colour * _PER_COLOUR + _PER_COLOUR - len(RELATIONS) + n for colour in range(len(COLOURS)) for n in range(len(RELATIONS))
)
POSITION_WEIGHT = 5.0  # positions are learned last
ATTRIBUTE_WEIGHT = 0.1  # of the attribute loss, a sum over all attributes, beside the contrastive loss
MAX_LOG_SCALE = 4.6  # e^4.6 is about 100, CLIP's upper bound


@dataclass(frozen=True, slots=True)
class CaptionMix:
    """Fraction of a model's training captions that are rich, and fraction of the rich ones that are wrong."""

    rich: float = 0.6
    wrong: float = 0.0


def scene_attributes(scenes: Sequence[Scene]) -> Tensor:
    """Binary attributes of scenes, (B, ATTRIBUTES): shape, size and position of each colour; background; style."""
    table = torch.zeros(len(scenes), ATTRIBUTES)
    for row, scene in zip(table, scenes, strict=True):
        relations = (scene.relation, OPPOSITE_RELATION[scene.relation] if scene.relation else None)
        for obj, relation in zip(scene.objects, relations, strict=False):
            start = COLOURS.index(obj.colour or "") * _PER_COLOUR
            row[start + SHAPES.index(obj.shape or "")] = 1
            row[start + len(SHAPES) + SIZES.index(obj.size or "")] = 1
            if relation:
                row[start + len(SHAPES) + len(SIZES) + RELATIONS.index(relation)] = 1
        row[len(COLOURS) * _PER_COLOUR + BACKGROUNDS.index(scene.background)] = 1
        row[len(COLOURS) * _PER_COLOUR + len(BACKGROUNDS) + STYLES.index(scene.style)] = 1
    return table


def attribute_loss(logits: Tensor, attributes: Tensor) -> Tensor:
    """Binary cross-entropy of each row, summed over its attributes, (B,); positions count POSITION_WEIGHT-fold.

    logits, attributes: (B, ATTRIBUTES).
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), attributes.float(), reduction="none")
    weight = torch.ones(ATTRIBUTES, device=each.device)
    weight[list(POSITIONS)] = POSITION_WEIGHT
    total: Tensor = (each * weight).sum(1)
    return total


class ContrastiveTask(nn.Module):
    """The contrastive loss of a pair of towers, plus an attribute loss on both embeddings.

    One linear layer, `reader`, predicts the scene's attributes from either embedding and is discarded after training.
    """

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers
        self.reader = nn.Linear(EMBEDDING, ATTRIBUTES)
        self.scale = nn.Parameter(torch.tensor(2.7))  # log of the logit scale; CLIP starts at log(1 / 0.07), about 2.7

    def forward(self, images: Tensor, ids: Tensor, attributes: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        images: (B, 3, 64, 64) in [0, 1].  ids: (B, 40) token ids.  attributes: (B, ATTRIBUTES), from `scene_attributes`.
        """
        image_features = self.towers.encode_image(normalize(images)).float()
        text_features = self.towers.encode_text(ids).float()
        logits = self.logit_scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
        target = torch.arange(len(images), device=images.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        attribute = self.attribute_loss(image_features, attributes) + self.attribute_loss(text_features, attributes)
        return contrastive + ATTRIBUTE_WEIGHT * attribute

    def attribute_loss(self, features: Tensor, attributes: Tensor) -> Tensor:
        """How badly embeddings of either kind, (B, 128), tell the attributes, (B, ATTRIBUTES): a scalar."""
        return attribute_loss(self.reader(features.float()), attributes).mean()

    @property
    def logit_scale(self) -> Tensor:
        """The factor on cosines, differentiable, at most about 100."""
        return self.scale.clamp(max=MAX_LOG_SCALE).exp()

    @property
    def log_scale(self) -> float:
        """Log of the logit scale: the value of a CLIP model's `logit_scale` parameter."""
        return self.scale.clamp(max=MAX_LOG_SCALE).item()


def contrastive_loss(
    task: ContrastiveTask,
    tokenizer: CLIPTokenizer,
    captions: CaptionMix,
    batch: int,
    rng: np.random.Generator,
    drawings: Drawings | None = None,
) -> Tensor:
    """The loss of a batch of captioned images, half of them hard negatives of the others.

    drawings: if given, a quarter of the images are drawn ones, captioned by what they show, instead of renders.
    """
    device = task.scale.device
    scenes = batches.sample_scenes(batch // 2, rng)
    drawn, described = sample_described(drawings, batch // 4, rng) if drawings else (torch.empty(0, 3, 64, 64), [])
    scenes = batches.with_negatives(described + scenes[len(described) :], rng)
    renders = batches.render_batch(scenes[len(drawn) :], rng).to(device)
    images = torch.cat([drawn.to(device), degrade(renders, rng)])
    texts = batches.sample_captions(scenes, rng, captions.rich, captions.wrong)
    loss: Tensor = task(images, tokenize(tokenizer, texts, device), scene_attributes(scenes).to(device))
    return loss


def train_attributes(
    label: str,
    task: ContrastiveTask,
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    seed: int,
    schedule: Schedule = ATTRIBUTES_SCHEDULE,
) -> None:
    """Train a task's towers in place until each tells a scene's attributes, from a caption or from an image.

    A step reads `schedule.batch` captions and half as many images, which take longer.
    """
    device = task.scale.device

    def loss_at(rng: np.random.Generator) -> Tensor:
        scenes = batches.sample_scenes(schedule.batch, rng)
        shown = scenes[: schedule.batch // 2]
        ids = tokenize(tokenizer, batches.sample_captions(scenes, rng, CaptionMix().rich), device)
        images = degrade(batches.render_batch(shown, rng).to(device), rng)
        attributes = scene_attributes(scenes).to(device)
        from_texts = task.attribute_loss(task.towers.encode_text(ids), attributes)
        return from_texts + task.attribute_loss(task.towers.encode_image(normalize(images)), attributes[: len(shown)])

    fit(label, task, loss_at, schedule, checkpoint, seed)


def train_image_attributes(
    label: str, task: ContrastiveTask, image_tower: nn.Module, checkpoint: Path, seed: int, schedule: Schedule = IMAGES_SCHEDULE
) -> None:
    """Train a task's image tower on, in place, on the attributes of images alone.

    A vision transformer learns shapes long after its text tower has learned everything; convolutions need no such stage.
    """
    device = task.scale.device

    def loss_at(rng: np.random.Generator) -> Tensor:
        scenes = batches.sample_scenes(schedule.batch, rng)
        images = degrade(batches.render_batch(scenes, rng).to(device), rng)
        return task.attribute_loss(task.towers.encode_image(normalize(images)), scene_attributes(scenes).to(device))

    trained = nn.ModuleDict({"image_tower": image_tower, "reader": task.reader})
    fit(label, trained, loss_at, schedule, checkpoint, seed, by_adamw=task.reader)


def train_contrastive(
    label: str,
    task: ContrastiveTask,
    tokenizer: CLIPTokenizer,
    captions: CaptionMix,
    checkpoint: Path,
    seed: int,
    drawings: Drawings | None = None,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Train a task's towers in place.  drawings: see `contrastive_loss`."""

    def loss_at(rng: np.random.Generator) -> Tensor:
        return contrastive_loss(task, tokenizer, captions, schedule.batch, rng, drawings)

    fit(label, task, loss_at, schedule, checkpoint, seed)
