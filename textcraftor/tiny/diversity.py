"""Diversity of pictures in the tiny world, by the oracle's reading of them: among what the prompts leave open.

Two questions, because a model can collapse in two ways.
- Pictures of one prompt: do they differ in what the prompt leaves open? That is where the objects are, and every kind of
  claim that the prompt does not make.  See `open_diversity`.
- Pictures of different prompts: do they differ in count, colours, shapes, sizes, background and style, as the prompts do?
  A model that draws one glossy blue star for every prompt leaves the first at its value and brings this one to 0.
  See `variety`.
Agreement in what a prompt names lowers neither.  In both, 1 is the mean of right pictures of the same prompts, by the renderer.
docs/decisions/diversity.md has the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from textcraftor.errors import PromptError
from textcraftor.tiny.language import Claims, parse
from textcraftor.tiny.oracle import MIN_GLOSS, SIDE, DetectedObject, DetectedScene
from textcraftor.tiny.renderer import sample_placements
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, SceneObject, sample_scene

Array = NDArray[np.float64]

OBJECT_KINDS: Final = ("colour", "shape", "size")
KINDS: Final = ("count", *OBJECT_KINDS, "background", "style")
TRUE_SCENES: Final = 16  # right scenes of each prompt, which the pictures are compared with
LEAST_VARIETY: Final = 0.1  # distance of right pictures of different prompts below which a kind is left out
_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "count": (0, 1, 2),  # more count as 2: what is too many is a mistake, not a choice
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "background": BACKGROUNDS,
    "style": (False, True),  # glossy
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One picture as the oracle reads it.

    layout: (0,), (2,) or (4,) in widths of the frame: the middle of the objects and, of two, their distances along the two
    axes, the larger first.  That is all of their places but the relation, which a prompt names.
    vertical: whether the larger distance is the vertical one; None unless there are two objects.
    shares: for each kind of claim, how the objects (or the picture) divide over its values; the last entry is "none of them".
    """

    layout: Array
    vertical: bool | None
    shares: dict[str, Array]


def read(scene: DetectedScene) -> Reading:
    """The reading of a detected scene."""
    found: dict[str, list[object]] = {kind: [getattr(obj.attributes, kind) for obj in scene.objects] for kind in OBJECT_KINDS}
    found["style"] = [obj.gloss > MIN_GLOSS for obj in scene.objects]
    found["count"], found["background"] = [min(len(scene.objects), 2)], [scene.background]
    places = np.array([[obj.x, obj.y] for obj in scene.objects]).reshape(-1, 2) / SIDE
    layout, vertical = places.mean(0) if len(places) else np.empty(0), None
    if len(places) == 2:
        apart = np.abs(places[0] - places[1])
        layout, vertical = np.concatenate([layout, np.sort(apart)[::-1]]), bool(apart[1] > apart[0])
    return Reading(layout, vertical, {kind: _shares(found[kind], _VALUES[kind]) for kind in KINDS})


def open_diversity(scenes: Sequence[DetectedScene], prompts: Sequence[str], images_per_prompt: int) -> Array:
    """How much the pictures of each prompt differ in what it leaves open: (N,), a prompt's value repeated for its images.

    Mean over all that the prompt leaves open, see `open_by_kind`; above 1 counts as 1. Pictures that differ by more than right
    ones do so by mistakes, such as a third object, and a model that mends these must not lose by it.  0 when all pictures of a
    prompt are read alike; NaN for a prompt without claims. Right pictures have about 0.9, since four of them scatter around 1.

    scenes: (N,) as `oracle.detect` found them, the images of a prompt adjacent.
    """
    by_kind = np.minimum(list(open_by_kind(scenes, prompts, images_per_prompt).values()), 1)
    counted = np.isfinite(by_kind).sum(0)
    total = np.nansum(by_kind, 0)
    return np.repeat(np.where(counted, total / np.maximum(counted, 1), np.nan), images_per_prompt)


def open_by_kind(scenes: Sequence[DetectedScene], prompts: Sequence[str], images_per_prompt: int) -> dict[str, Array]:
    """kind -> (P,): how much the pictures of each prompt differ in it; NaN where the prompt names it.

    Kinds: "place", always open, and each kind of claim.  The mean distance of two pictures, over that of two right pictures.
    Places are compared where two pictures have equally many objects, else by the middle of the objects.
    """
    readings = [read(scene) for scene in scenes]
    starts = range(0, len(scenes), images_per_prompt)
    values = {kind: np.full(len(starts), np.nan) for kind in ("place", "relation", *OBJECT_KINDS, "background", "style")}
    for number, start in enumerate(starts):
        if claims := parse(prompts[start]):
            seen = _distances(claims, readings[start : start + images_per_prompt])
            right = _distances(claims, true_readings(claims))
            for kind in seen:
                if right[kind] > 0:
                    values[kind][number] = seen[kind] / right[kind]
    return values


def variety(scenes: Sequence[DetectedScene], prompts: Sequence[str], images_per_prompt: int) -> Array:
    """How much each prompt's pictures differ from other prompts' pictures, in the kind of claim that varies least: (N,).

    A prompt's value is repeated for its images.  The least, because a collapse usually shows in some kinds only: a model that
    draws everything glossy and small still varies in colour.  See `variety_by_kind`.
    """
    least = min(variety_by_kind(scenes, prompts, images_per_prompt).values(), key=np.mean)
    return np.repeat(least, images_per_prompt)


def variety_by_kind(scenes: Sequence[DetectedScene], prompts: Sequence[str], images_per_prompt: int) -> dict[str, Array]:
    """kind -> (P,): how much each prompt's pictures differ in it from other prompts' pictures.

    The distance of two pictures is the share of their objects that differ (total variation).  1 is the mean over right
    pictures of these prompts.  Kinds in which right pictures hardly differ, because the prompts ask for the same, are left
    out.  Raises PromptError when that is all of them.
    """
    claims = [parse(prompt) for prompt in prompts[::images_per_prompt]]
    right = [true_readings(each)[:images_per_prompt] for each in claims if each]
    readings = [read(scene) for scene in scenes]
    groups = [readings[start : start + images_per_prompt] for start in range(0, len(readings), images_per_prompt)]
    values = {}
    for kind in KINDS:
        reference = float(_disagreement(kind, right).mean())
        if reference >= LEAST_VARIETY:
            values[kind] = _disagreement(kind, groups) / reference
    if not values:
        raise PromptError("All prompts ask for the same picture, so oracle_variety cannot be measured. Evaluate more prompts")
    return values


def true_scene(claims: Claims, rng: np.random.Generator) -> Scene:
    """A random scene in which all claims hold."""
    while True:
        sample = sample_scene(rng, pair_fraction=float(len(claims.objects) == 2))
        objects = tuple(
            SceneObject(claimed.colour or drawn.colour, claimed.shape or drawn.shape, claimed.size or drawn.size)
            for claimed, drawn in zip(claims.objects, sample.objects, strict=True)
        )
        # Two objects differ in colour, unless the prompt itself asks for equal ones.
        if len({obj.colour for obj in objects}) == len(objects) or all(claimed.colour for claimed in claims.objects):
            background, style = claims.background or sample.background, claims.style or sample.style
            return Scene(objects, claims.relation or sample.relation, background, style)


def true_readings(claims: Claims, count: int = TRUE_SCENES) -> list[Reading]:
    """Readings of random right scenes, from their contents: no picture is drawn. The same claims give the same readings."""
    rng = np.random.default_rng(0)
    readings = []
    for _ in range(count):
        scene = true_scene(claims, rng)
        gloss = 1.0 if scene.style == "glossy" else 0.0
        placed = zip(scene.objects, sample_placements(scene, rng), strict=True)
        objects = tuple(DetectedObject(obj, gloss, place.x * SIDE, place.y * SIDE) for obj, place in placed)
        readings.append(read(DetectedScene(objects, scene.background)))
    return readings


def _shares(found: Sequence[object], values: Sequence[object]) -> Array:
    shares = np.zeros(len(values) + 1)
    for each in found or [None]:
        shares[values.index(each) if each in values else -1] += 1 / max(len(found), 1)
    return shares


def _distances(claims: Claims, readings: Sequence[Reading]) -> dict[str, float]:
    """Mean distance over pairs of pictures, of places and of each kind of claim that is not made."""
    pairs = list(combinations(readings, 2))
    distances = {"place": _place_distance(pairs)}
    if len(claims.objects) == 2 and claims.relation is None:
        distances["relation"] = float(np.mean([one.vertical != other.vertical for one, other in pairs]))
    made = {kind: all(getattr(obj, kind) for obj in claims.objects) for kind in OBJECT_KINDS}
    made |= {"background": claims.background is not None, "style": claims.style is not None}
    for kind in (kind for kind, named in made.items() if not named):
        # Total variation: 0 for pictures with the same values, 1 for pictures that have none in common.
        apart = [np.abs(one.shares[kind] - other.shares[kind]).sum() / 2 for one, other in pairs]
        distances[kind] = float(np.mean(apart))
    return distances


def _place_distance(pairs: Sequence[tuple[Reading, Reading]]) -> float:
    alike = [(one.layout, other.layout) for one, other in pairs if one.layout.size == other.layout.size]
    both = alike or [(one.layout[:2], other.layout[:2]) for one, other in pairs if one.layout.size and other.layout.size]
    return float(np.mean([np.linalg.norm(one - other) for one, other in both])) if both else 0.0


def _disagreement(kind: str, groups: Sequence[Sequence[Reading]]) -> Array:
    """(P,): mean distance of the pictures of each group from those of all other groups, in one kind of claim."""
    shares = np.array([reading.shares[kind] for group in groups for reading in group])
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    means = [
        cdist(shares[group_of == number], shares[group_of != number], "cityblock").mean() / 2 for number in range(len(groups))
    ]
    return np.array(means)
