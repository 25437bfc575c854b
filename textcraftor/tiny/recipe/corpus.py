"""Fresh batches of rendered scenes: nothing is stored, every step sees pictures that no step saw before."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from textcraftor.tiny.language import plain_caption, rich_caption
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import Scene, change_one, sample_scene


def pictures(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Render scenes.  Returns (B, 3, 64, 64) float in [0, 1]."""
    stack = np.stack([render(scene, rng) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255


def scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Independent scenes."""
    return [sample_scene(rng) for _ in range(count)]


def twins(count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of which each has, `count // 2` places on, a twin that differs in one attribute."""
    half = scenes(count // 2, rng)
    return half + [change_one(scene, rng) for scene in half]


def captions(
    batch: Sequence[Scene], rng: np.random.Generator, rich: float, wrong: float = 0.0, empty: float = 0.0
) -> list[str]:
    """A caption for each scene: rich with chance `rich` and plain otherwise.

    wrong: the share of the rich captions that tell of another scene; empty: the chance of no caption at all.
    """

    def caption(scene: Scene) -> str:
        if rng.random() < empty:
            return ""
        if rng.random() >= rich:
            return plain_caption(scene)
        return rich_caption(sample_scene(rng) if rng.random() < wrong else scene, rng)

    return [caption(scene) for scene in batch]
