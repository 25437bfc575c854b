"""Random training batches: scenes, their images and their captions.  Nothing is stored; every step draws new scenes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from textcraftor.tiny.language import plain_caption, rich_caption
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import Scene, change_one_attribute, sample_scene


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Images of scenes, (B, 3, 64, 64) float32 in [0, 1]."""
    return to_tensor(np.stack([render(scene, rng) for scene in scenes]))


def sample_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` independent scenes."""
    return [sample_scene(rng) for _ in range(count)]


def with_negatives(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Scene]:
    """The scenes, followed by a hard negative of each: the same scene with one attribute changed."""
    return [*scenes, *(change_one_attribute(scene, rng) for scene in scenes)]


def sample_captions(
    scenes: Sequence[Scene], rng: np.random.Generator, rich: float, wrong: float = 0.0, empty: float = 0.0
) -> list[str]:
    """A caption for each scene.

    rich: probability of a rich caption instead of a plain one.  wrong: fraction of the rich captions that describe
    another scene.  empty: probability of the empty caption, as classifier-free guidance needs.
    """

    def caption(scene: Scene) -> str:
        if rng.random() < empty:
            return ""
        if rng.random() >= rich:
            return plain_caption(scene)
        return rich_caption(sample_scene(rng) if rng.random() < wrong else scene, rng)

    return [caption(scene) for scene in scenes]
