"""Reads the pixels of a picture, without learning, and says which claims of its prompt hold.

No gradient reaches it and no reward model knows it.  Foreground is what has colour (grounds have none); things are the
connected components of each colour; their shape is the template that overlaps best, their size the width of their box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from textcraftor.tiny.language import Claims, parse
from textcraftor.tiny.renderer import GROUND, PALETTE, distance
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, Thing

KINDS: Final = ("count", "colour", "shape", "size", "relation", "background", "style")

SIDE: Final = 64  # pictures of another size are resized to it
CHROMA: Final = 0.24  # max - min channel from which a pixel counts as coloured
SMALLEST: Final = 50  # pixels; less is a fringe, not a thing
LARGE: Final = 0.35 * SIDE  # between the widths of small and large things
SHAPE_OVERLAP: Final = 0.6  # intersection over union under which a blob has no shape at all
GLOSS: Final = 0.05  # spread of brightness inside a thing
_GRID: Final = 24


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing found in a picture: what it is, how glossy, and its centre in pixels."""

    thing: Thing
    gloss: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class View:
    """What a picture shows.  background is None when the ground is no background of this world."""

    seen: tuple[Seen, ...]
    background: str | None


def _directions() -> NDArray[np.float32]:
    colours = np.asarray([PALETTE[name] for name in COLOURS], dtype=np.float32)
    centred = colours - colours.mean(1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


_HUES: Final = _directions()  # (6, 3): each colour without its brightness
_GREYS: Final = np.asarray([np.mean(GROUND[name]) / 255 for name in BACKGROUNDS], dtype=np.float32)


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask's bounding box stretched onto a square grid, so that only its form is left."""
    height, width = mask.shape
    rows = ((np.arange(_GRID) + 0.5) * height / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * width / _GRID).astype(int)
    return mask[np.ix_(rows, columns)]


@cache
def _templates() -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Normalised masks of every shape at several widths and subpixel places, (N, grid, grid), and whose they are (N,)."""
    masks, owners = [], []
    for index, shape in enumerate(SHAPES):
        for width in (16.0, 19.0, 26.0, 30.0):
            for offset in (0.0, 0.5):
                ys, xs = np.mgrid[0:48, 0:48].astype(np.float32) + 0.5 - 24 - offset
                mask = distance(shape, xs, ys, width / 2) < 0
                masks.append(_normalised(mask[ndimage.find_objects(mask.astype(int))[0]]))
                owners.append(index)
    return np.stack(masks), np.asarray(owners)


def _shape(mask: NDArray[np.bool_]) -> str | None:
    templates, owners = _templates()
    form = _normalised(mask)
    overlap = (templates & form).sum((1, 2)) / (templates | form).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[owners[best]] if overlap[best] >= SHAPE_OVERLAP else None


def _look(picture: NDArray[np.float32], hue: NDArray[np.intp], coloured: NDArray[np.bool_]) -> View:
    seen = []
    ground = ~coloured
    for index in np.unique(hue[coloured]):
        labels, _ = ndimage.label(coloured & (hue == index))
        for number, window in enumerate(ndimage.find_objects(labels), start=1):
            # A highlight is white: without filling, a glossy thing would have a hole.
            mask = np.asarray(ndimage.binary_fill_holes(labels[window] == number))
            if mask.sum() < SMALLEST:
                continue
            ground[window] &= ~mask
            height, width = mask.shape
            size = "large" if np.sqrt(height * width) > LARGE else "small"
            inside = ndimage.binary_erosion(mask)
            gloss = float(picture[window][inside].mean(1).std()) if inside.any() else 0.0
            rows, columns = window
            y, x = ndimage.center_of_mass(mask)
            thing = Thing(COLOURS[index], _shape(mask), size)
            seen.append(Seen(thing, gloss, columns.start + x + 0.5, rows.start + y + 0.5))
    if ground.sum() < SIDE:
        return View(tuple(seen), None)
    level = np.median(picture[ground].mean(1))
    return View(tuple(seen), BACKGROUNDS[int(np.abs(_GREYS - level).argmin())])


def look(images: torch.Tensor) -> list[View]:
    """What each picture shows.  images: (B, 3, H, W) in [0, 1]."""
    images = images.detach().float().clamp(0, 1)
    if images.shape[-2:] != (SIDE, SIDE):
        images = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    coloured = pictures.max(-1) - pictures.min(-1) > CHROMA
    hues = ((pictures - pictures.mean(-1, keepdims=True)) @ _HUES.T).argmax(-1)
    return [_look(*each) for each in zip(pictures, hues, coloured, strict=True)]


def _stands(first: Seen, second: Seen, relation: str) -> bool:
    match relation:
        case "left of":
            return first.x + 3 < second.x
        case "right of":
            return second.x + 3 < first.x
        case "above":
            return first.y + 3 < second.y
    return second.y + 3 < first.y


def _judge_things(claims: Claims, seen: Sequence[Seen | None]) -> dict[str, bool]:
    """Verdicts on things and relation, when the n-th claimed thing is taken to be the n-th seen one."""
    verdicts = {}
    for number, (claimed, found) in enumerate(zip(claims.things, seen, strict=True), start=1):
        for kind in ("colour", "shape", "size"):
            wanted = getattr(claimed, kind)
            if wanted is not None:
                verdicts[f"{kind}.{number}"] = found is not None and getattr(found.thing, kind) == wanted
    if claims.relation is not None:
        first, second = seen
        together = first is not None and second is not None and _stands(first, second, claims.relation)
        verdicts["relation"] = together
    return verdicts


def judge(view: View, claims: Claims) -> dict[str, bool]:
    """Whether each claim holds: "count", "colour.1", "shape.1", "size.1", ..., "relation", "background", "style".

    The things that are seen are matched with those that are claimed as favourably as can be, colour first.
    """
    wanted = len(claims.things)
    spare: list[Seen | None] = [*view.seen, *[None] * wanted]

    def favour(verdicts: dict[str, bool]) -> float:
        return sum(held * (2.0 if kind.startswith("colour") else 1.0) for kind, held in verdicts.items())

    choices = [_judge_things(claims, chosen) for chosen in permutations(spare[: wanted + 4], wanted)]
    best: dict[str, bool] = max(choices, key=favour)
    verdicts = {"count": len(view.seen) == wanted, **best}
    if claims.background is not None:
        verdicts["background"] = view.background == claims.background
    if claims.style is not None:
        gloss = float(np.mean([thing.gloss for thing in view.seen])) if view.seen else -1.0
        verdicts["style"] = gloss > GLOSS if claims.style == "glossy" else 0 <= gloss <= GLOSS
    return verdicts


class Oracle:
    """The embedded default's human: it can be asked, never optimised."""

    version = "1"

    def claims(self, images: torch.Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
        """For each picture which claims of its prompt hold; an empty dict where the prompt makes none.

        images: (B, 3, H, W) in [0, 1].  Raises ValueError if there are not as many prompts as images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        read = [parse(prompt) for prompt in prompts]
        return [judge(view, claims) if claims else {} for view, claims in zip(look(images), read, strict=True)]

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Fraction of each prompt's claims that hold, (B,) float32; NaN where a prompt makes none."""
        verdicts = self.claims(images, prompts)
        return torch.tensor([float(np.mean(list(held.values()))) if held else float("nan") for held in verdicts])

    def accuracy(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Fraction of claims that hold, for each kind of claim that the prompts make and "all" (every claim counts once)."""
        pairs = [(key.split(".")[0], held) for verdicts in self.claims(images, prompts) for key, held in verdicts.items()]
        by_kind = {kind: [held for found, held in pairs if found == kind] for kind in KINDS}
        by_kind["all"] = [held for _, held in pairs]
        return {kind: float(np.mean(held)) for kind, held in by_kind.items() if held}
