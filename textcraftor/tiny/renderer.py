"""Draws scenes: antialiased shapes from signed distances, flat or glossy, each time in a slightly different place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from textcraftor.tiny.scenes import Scene

Array = NDArray[np.floating]

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 208, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 200, 215),
}
GROUND: Final[dict[str, tuple[int, int, int]]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (18, 18, 18),
}
# Width of a thing as a fraction of the frame. The gap between the two ranges is what makes "large" decidable.
EXTENT: Final = {"small": (0.26, 0.30), "large": (0.40, 0.46)}
MARGIN = 0.02
GAP = 0.04


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thing stands: centre and width, as fractions of the frame's side."""

    x: float
    y: float
    extent: float


def _spread(rng: np.random.Generator, extents: Sequence[float]) -> list[float]:
    """Centres of things in a row that neither touch nor leave the frame; the free space is shared out at random."""
    slack = 1 - 2 * MARGIN - sum(extents) - GAP * (len(extents) - 1)
    shares = rng.dirichlet(np.ones(len(extents) + 1)) * slack
    centres, edge = [], MARGIN
    for share, extent in zip(shares, extents, strict=False):
        centres.append(edge + share + extent / 2)
        edge += share + extent + GAP
    return centres


def place(scene: Scene, rng: np.random.Generator) -> tuple[Place, ...]:
    """Choose where each thing of the scene stands, inside the frame and in the relation that the scene says."""
    extents = [float(rng.uniform(*EXTENT[thing.size or "small"])) for thing in scene.things]
    free = [rng.uniform(MARGIN + extent / 2, 1 - MARGIN - extent / 2) for extent in extents]
    if scene.relation is None:
        return (Place(_spread(rng, extents)[0], free[0], extents[0]),)
    first_is_before = scene.relation in ("left of", "above")
    order = extents if first_is_before else extents[::-1]
    along = _spread(rng, order)
    along = along if first_is_before else along[::-1]
    # Across the line the second thing may stray from the first by half their distance: the relation stays plain to see.
    reach = abs(along[1] - along[0]) / 2
    low, high = MARGIN + extents[1] / 2, 1 - MARGIN - extents[1] / 2
    across = [free[0], float(np.clip(free[0] + rng.uniform(-reach, reach), low, high))]
    if scene.relation in ("left of", "right of"):
        return tuple(Place(x, y, extent) for x, y, extent in zip(along, across, extents, strict=True))
    return tuple(Place(x, y, extent) for x, y, extent in zip(across, along, extents, strict=True))


def distance(shape: str, u: Array, v: Array, half: float) -> Array:
    """Signed distance in pixels from the outline of a shape (negative inside).

    u, v: pixel offsets from its centre, right and down; half: half its width in pixels.
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


def draw(scene: Scene, places: Sequence[Place], rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw a scene with its things at given places.  Returns (size, size, 3) uint8; colours vary by a few per cent."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = np.asarray(GROUND[scene.background]) * rng.uniform(0.97, 1.03)
    for thing, spot in zip(scene.things, places, strict=True):
        u, v, half = xs - spot.x * size, ys - spot.y * size, spot.extent * size / 2
        cover = np.clip(0.5 - distance(thing.shape or "circle", u, v, half), 0, 1)[..., None]
        colour = np.asarray(PALETTE[thing.colour or "red"]) * rng.uniform(0.95, 1.04)
        paint = np.broadcast_to(colour, canvas.shape)
        if scene.style == "glossy":
            shade = 1 - 0.28 * np.clip((u + v) / (2 * half), -0.7, 0.9)
            spark = 0.95 * np.exp(-((u + 0.15 * half) ** 2 + (v + 0.18 * half) ** 2) / (2 * (0.24 * half) ** 2))
            paint = paint * shade[..., None] * (1 - spark[..., None]) + 255 * spark[..., None]
        canvas = canvas * (1 - cover) + paint * cover
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Place and draw a scene.  Returns (size, size, 3) uint8 RGB, the same for the same scene and generator state."""
    return draw(scene, place(scene, rng), rng, size)
