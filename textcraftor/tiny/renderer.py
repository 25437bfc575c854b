"""Draws scenes at random positions: antialiased shapes from signed distance functions, flat or glossy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from textcraftor.tiny.scenes import Scene

Array = NDArray[np.floating]

OBJECT_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 208, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 200, 215),
}
BACKGROUND_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (18, 18, 18),
}
# Width of an object as a fraction of the frame. The gap between the two ranges makes "small" and "large" decidable.
WIDTH_RANGES: Final = {"small": (0.26, 0.30), "large": (0.40, 0.46)}
FRAME_MARGIN = 0.02
MIN_GAP = 0.04


@dataclass(frozen=True, slots=True)
class Placement:
    """Centre and width of an object, as fractions of the side of the frame."""

    x: float
    y: float
    width: float


def _sample_centres(rng: np.random.Generator, widths: Sequence[float]) -> list[float]:
    """Random centres along one axis for objects that neither touch nor leave the frame."""
    free_space = 1 - 2 * FRAME_MARGIN - sum(widths) - MIN_GAP * (len(widths) - 1)
    gaps = rng.dirichlet(np.ones(len(widths) + 1)) * free_space
    centres, edge = [], FRAME_MARGIN
    for gap, width in zip(gaps, widths, strict=False):
        centres.append(edge + gap + width / 2)
        edge += gap + width + MIN_GAP
    return centres


def sample_placements(scene: Scene, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Random placements of a scene's objects, inside the frame and in the scene's relation."""
    widths = [float(rng.uniform(*WIDTH_RANGES[obj.size or "small"])) for obj in scene.objects]
    free = [rng.uniform(FRAME_MARGIN + width / 2, 1 - FRAME_MARGIN - width / 2) for width in widths]
    if scene.relation is None:
        return (Placement(_sample_centres(rng, widths)[0], free[0], widths[0]),)
    first_is_before = scene.relation in ("left of", "above")
    order = widths if first_is_before else widths[::-1]
    along = _sample_centres(rng, order)
    along = along if first_is_before else along[::-1]
    # On the other axis the two may differ by half their distance at most, so that the relation stays obvious.
    reach = abs(along[1] - along[0]) / 2
    low, high = FRAME_MARGIN + widths[1] / 2, 1 - FRAME_MARGIN - widths[1] / 2
    across = [free[0], float(np.clip(free[0] + rng.uniform(-reach, reach), low, high))]
    if scene.relation in ("left of", "right of"):
        return tuple(Placement(x, y, width) for x, y, width in zip(along, across, widths, strict=True))
    return tuple(Placement(x, y, width) for x, y, width in zip(across, along, widths, strict=True))


def signed_distance(shape: str, u: Array, v: Array, half: float) -> Array:
    """Signed distance in pixels from the outline of a shape, negative inside.

    u, v: pixel offsets from its centre, right and down.  half: half its width in pixels.
    Raises ValueError for an unknown shape.
    """
    match shape:
        case "circle":
            return np.hypot(u, v) - half
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.92 * half
        case "triangle":
            side = (1.8 * np.abs(u) - (v + half)) / np.hypot(1.8, 1.0)
            return np.maximum(v - 0.8 * half, side)
        case "star":
            tip, valley, tenth = 1.08 * half, 0.5 * half, np.pi / 5
            angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
            radius = np.hypot(u, v)
            x, y = radius * np.cos(angle), radius * np.sin(angle)
            edge_x, edge_y = valley * np.cos(tenth) - tip, valley * np.sin(tenth)
            return ((x - tip) * edge_y - y * edge_x) / np.hypot(edge_x, edge_y)
        case "cross":
            u, v = np.abs(u), np.abs(v)
            arm = 0.36 * half
            return np.minimum(np.maximum(u - half, v - arm), np.maximum(v - half, u - arm))
    raise ValueError(f"unknown shape {shape!r}")


def draw(scene: Scene, placements: Sequence[Placement], rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw a scene's objects at given placements.  Returns (size, size, 3) uint8 RGB; brightness varies by a few per cent."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = np.asarray(BACKGROUND_COLOURS[scene.background]) * rng.uniform(0.97, 1.03)
    for obj, placement in zip(scene.objects, placements, strict=True):
        u, v, half = xs - placement.x * size, ys - placement.y * size, placement.width * size / 2
        coverage = np.clip(0.5 - signed_distance(obj.shape or "circle", u, v, half), 0, 1)[..., None]
        colour = np.asarray(OBJECT_COLOURS[obj.colour or "red"]) * rng.uniform(0.95, 1.04)
        fill = np.broadcast_to(colour, canvas.shape)
        if scene.style == "glossy":
            shade = 1 - 0.28 * np.clip((u + v) / (2 * half), -0.7, 0.9)
            highlight = 0.95 * np.exp(-((u + 0.15 * half) ** 2 + (v + 0.18 * half) ** 2) / (2 * (0.24 * half) ** 2))
            fill = fill * shade[..., None] * (1 - highlight[..., None]) + 255 * highlight[..., None]
        canvas = canvas * (1 - coverage) + fill * coverage
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw a scene at random placements.  Returns (size, size, 3) uint8 RGB; deterministic given the generator's state."""
    return draw(scene, sample_placements(scene, rng), rng, size)
