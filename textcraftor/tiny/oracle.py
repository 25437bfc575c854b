"""Checks the claims of a prompt against the pixels of an image, with classical image processing only.

1. Segmentation: a pixel is foreground when it has colour (backgrounds are grey levels); its colour is the nearest hue.
2. Objects: the connected components of each colour.
3. Shape: the template of the same area with the largest intersection over union; size: the width of the bounding box.
4. Matching: the assignment of found to claimed objects under which most claims hold, colours weighted double.

It is not learned and passes no gradient, so nothing can be optimised against it directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from textcraftor.tiny.language import Claims, parse
from textcraftor.tiny.renderer import BACKGROUND_COLOURS, OBJECT_COLOURS, signed_distance
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, SceneObject

CLAIM_KINDS: Final = ("count", "colour", "shape", "size", "relation", "background", "style")

SIDE: Final = 64  # pixels; other images are resized to it
MIN_CHROMA: Final = 0.24  # largest minus smallest channel from which a pixel counts as coloured
MIN_AREA: Final = 50  # pixels; a smaller component is an artefact of an edge, not an object
LARGE_WIDTH: Final = 0.35 * SIDE  # pixels, between the widths of small and large objects
MIN_SHAPE_IOU: Final = 0.5  # intersection over union below which a component has no known shape
MIN_GLOSS: Final = 0.05  # standard deviation of brightness inside an object from which it counts as glossy
MIN_OFFSET: Final = 3  # pixels between two centres from which one is left of or above the other
_GRID: Final = 24  # cells along a side
_GRID_SIDE: Final = 1.9  # of the grid, in square roots of a mask's area: a star's tips reach 0.9 from its centre


@dataclass(frozen=True, slots=True)
class DetectedObject:
    """An object found in an image: its attributes, its gloss (spread of brightness), and its centre in pixels."""

    attributes: SceneObject
    gloss: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class DetectedScene:
    """The objects and the background found in an image.  background: None when objects cover nearly all of it."""

    objects: tuple[DetectedObject, ...]
    background: str | None


def _hue_directions() -> NDArray[np.float32]:
    colours = np.asarray([OBJECT_COLOURS[name] for name in COLOURS], dtype=np.float32)
    centred = colours - colours.mean(1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


_HUES: Final = _hue_directions()  # (6, 3): each colour without its brightness, unit length
_GREYS: Final = np.asarray([np.mean(BACKGROUND_COLOURS[name]) / 255 for name in BACKGROUNDS], dtype=np.float32)


def _resample_to_grid(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask scaled to a common area, its centre of mass in the middle of a square grid: shape without size or place.

    The bounding box would not do: two pixels that stick out of a corner change it, and the shape hardly.
    """
    offsets = ((np.arange(_GRID) + 0.5) / _GRID - 0.5) * _GRID_SIDE * np.sqrt(mask.sum())
    y, x = ndimage.center_of_mass(mask)
    rows, columns = np.rint(y + offsets).astype(int), np.rint(x + offsets).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
    return inside & mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))]


@cache
def _templates() -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Masks of every shape at several widths and subpixel offsets, drawn thinner and bolder too: (N, grid, grid), and their
    indices into SHAPES, (N,)."""
    masks, labels = [], []
    for index, shape in enumerate(SHAPES):
        for width, offset, thickness in product((16.0, 19.0, 26.0, 30.0), (0.0, 0.5), (-1.0, 0.0, 1.0)):
            ys, xs = np.mgrid[0:48, 0:48].astype(np.float32) + 0.5 - 24 - offset
            masks.append(_resample_to_grid(signed_distance(shape, xs, ys, width / 2) < thickness))
            labels.append(index)
    return np.stack(masks), np.asarray(labels)


def _classify_shape(mask: NDArray[np.bool_]) -> str | None:
    templates, labels = _templates()
    resampled = _resample_to_grid(mask)
    overlap = (templates & resampled).sum((1, 2)) / (templates | resampled).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[labels[best]] if overlap[best] >= MIN_SHAPE_IOU else None


def _detect(pixels: NDArray[np.float32], hue: NDArray[np.intp], coloured: NDArray[np.bool_]) -> DetectedScene:
    """One image.  pixels: (H, W, 3) in [0, 1]; hue: (H, W), index into COLOURS; coloured: (H, W)."""
    found = []
    background = ~coloured
    for index in np.unique(hue[coloured]):
        labels, _ = ndimage.label(coloured & (hue == index))
        for number, window in enumerate(ndimage.find_objects(labels), start=1):
            # Highlights are white: without filling holes, a glossy object would have one.
            mask = np.asarray(ndimage.binary_fill_holes(labels[window] == number))
            if mask.sum() < MIN_AREA:
                continue
            background[window] &= ~mask
            height, width = mask.shape
            size = "large" if np.sqrt(height * width) > LARGE_WIDTH else "small"
            interior = ndimage.binary_erosion(mask)
            gloss = float(pixels[window][interior].mean(1).std()) if interior.any() else 0.0
            rows, columns = window
            y, x = ndimage.center_of_mass(mask)
            attributes = SceneObject(COLOURS[index], _classify_shape(mask), size)
            found.append(DetectedObject(attributes, gloss, columns.start + x + 0.5, rows.start + y + 0.5))
    if background.sum() < SIDE:
        return DetectedScene(tuple(found), None)
    brightness = np.median(pixels[background].mean(1))
    return DetectedScene(tuple(found), BACKGROUNDS[int(np.abs(_GREYS - brightness).argmin())])


def detect(images: torch.Tensor) -> list[DetectedScene]:
    """Objects and background of each image.  images: (B, 3, H, W) in [0, 1]."""
    images = images.detach().float().clamp(0, 1)
    if images.shape[-2:] != (SIDE, SIDE):
        images = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    coloured = pixels.max(-1) - pixels.min(-1) > MIN_CHROMA
    hues = ((pixels - pixels.mean(-1, keepdims=True)) @ _HUES.T).argmax(-1)
    return [_detect(*image) for image in zip(pixels, hues, coloured, strict=True)]


def _relation_holds(first: DetectedObject, second: DetectedObject, relation: str) -> bool:
    match relation:
        case "left of":
            return first.x + MIN_OFFSET < second.x
        case "right of":
            return second.x + MIN_OFFSET < first.x
        case "above":
            return first.y + MIN_OFFSET < second.y
    return second.y + MIN_OFFSET < first.y


def _check_objects(claims: Claims, found: Sequence[DetectedObject | None]) -> dict[str, bool]:
    """Verdicts on objects and relation when the n-th claimed object is matched with the n-th found one (None: missing)."""
    verdicts = {}
    for number, (claimed, match) in enumerate(zip(claims.objects, found, strict=True), start=1):
        for kind in ("colour", "shape", "size"):
            expected = getattr(claimed, kind)
            if expected is not None:
                verdicts[f"{kind}.{number}"] = match is not None and getattr(match.attributes, kind) == expected
    if claims.relation is not None:
        first, second = found
        both = first is not None and second is not None and _relation_holds(first, second, claims.relation)
        verdicts["relation"] = both
    return verdicts


def check_claims(scene: DetectedScene, claims: Claims) -> dict[str, bool]:
    """Whether each claim holds: "count", "colour.1", "shape.1", "size.1", ..., "relation", "background", "style".

    Found objects are matched with claimed ones so that most claims hold, colours weighted double.
    """
    count = len(claims.objects)
    candidates: list[DetectedObject | None] = [*scene.objects, *[None] * count]

    def match_quality(verdicts: dict[str, bool]) -> float:
        return sum(holds * (2.0 if kind.startswith("colour") else 1.0) for kind, holds in verdicts.items())

    matches = [_check_objects(claims, chosen) for chosen in permutations(candidates[: count + 4], count)]
    best: dict[str, bool] = max(matches, key=match_quality)
    verdicts = {"count": len(scene.objects) == count, **best}
    if claims.background is not None:
        verdicts["background"] = scene.background == claims.background
    if claims.style is not None:
        gloss = float(np.mean([obj.gloss for obj in scene.objects])) if scene.objects else -1.0
        verdicts["style"] = gloss > MIN_GLOSS if claims.style == "glossy" else 0 <= gloss <= MIN_GLOSS
    return verdicts


class Oracle:
    """Ground truth for the tiny world: which claims of its prompt hold in an image.

    Evaluation only.  It stands in for human judgement in the embedded default; no reward model is trained on it.
    """

    version = "2"  # of the readings: 2 reads a shape by its area, not by its bounding box

    def check_claims(self, images: torch.Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
        """The verdict on each claim of each image's prompt, keyed as in `check_claims`; {} for a prompt without claims.

        images: (B, 3, H, W) in [0, 1].  Raises ValueError if the numbers of images and prompts differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        claims = [parse(prompt) for prompt in prompts]
        return [check_claims(scene, each) if each else {} for scene, each in zip(detect(images), claims, strict=True)]

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Fraction of each prompt's claims that hold, (B,) float32; NaN for a prompt without claims."""
        verdicts = self.check_claims(images, prompts)
        return torch.tensor([float(np.mean(list(each.values()))) if each else float("nan") for each in verdicts])

    def accuracy(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Fraction of claims that hold, by kind of claim and over "all" claims; kinds that no prompt claims are absent."""
        pairs = [(key.split(".")[0], holds) for each in self.check_claims(images, prompts) for key, holds in each.items()]
        by_kind = {kind: [holds for claimed, holds in pairs if claimed == kind] for kind in CLAIM_KINDS}
        by_kind["all"] = [holds for _, holds in pairs]
        return {kind: float(np.mean(held)) for kind, held in by_kind.items() if held}
