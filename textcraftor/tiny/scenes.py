"""The content of a picture as data: one or two objects, their spatial relation, background and style."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
SIZES: Final = ("small", "large")
RELATIONS: Final = ("left of", "right of", "above", "below")
BACKGROUNDS: Final = ("white", "grey", "black")
STYLES: Final = ("flat", "glossy")

OPPOSITE_RELATION: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape.  In a scene every field is set; in a claim, None marks what the prompt does not say."""

    colour: str | None
    shape: str | None
    size: str | None


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one picture.

    objects: one or two.  Two objects always differ in colour, so that "the red one" is unambiguous.
    relation: position of the first object relative to the second ("left of", ...); None with one object.
    """

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str
    style: str


def _pick(rng: np.random.Generator, words: tuple[str, ...], exclude: str | None = None) -> str:
    allowed = [word for word in words if word != exclude]
    return allowed[int(rng.integers(len(allowed)))]


def sample_scene(rng: np.random.Generator, pair_fraction: float = 0.6) -> Scene:
    """Draw a scene with every attribute uniform; a fraction `pair_fraction` of the scenes has two objects."""
    first = SceneObject(_pick(rng, COLOURS), _pick(rng, SHAPES), _pick(rng, SIZES))
    objects: tuple[SceneObject, ...] = (first,)
    relation = None
    if rng.random() < pair_fraction:
        objects = (first, SceneObject(_pick(rng, COLOURS, exclude=first.colour), _pick(rng, SHAPES), _pick(rng, SIZES)))
        relation = _pick(rng, RELATIONS)
    return Scene(objects, relation, _pick(rng, BACKGROUNDS), _pick(rng, STYLES))


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """A hard negative: the scene with one attribute changed, or with the colours of its two objects swapped."""
    index = int(rng.integers(len(scene.objects)))
    obj = scene.objects[index]
    fields = ["colour", "shape", "size", "background", "style"] + (["relation", "swap"] if scene.relation else [])
    match fields[int(rng.integers(len(fields)))]:
        case "background":
            return replace(scene, background=_pick(rng, BACKGROUNDS, exclude=scene.background))
        case "style":
            return replace(scene, style=_pick(rng, STYLES, exclude=scene.style))
        case "relation":
            return replace(scene, relation=_pick(rng, RELATIONS, exclude=scene.relation))
        case "swap":
            first, second = scene.objects
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            return replace(scene, objects=swapped)
        case "size":
            changed = replace(obj, size=_pick(rng, SIZES, exclude=obj.size))
        case "shape":
            changed = replace(obj, shape=_pick(rng, SHAPES, exclude=obj.shape))
        case _:
            taken = {other.colour for other in scene.objects}
            free = tuple(colour for colour in COLOURS if colour not in taken)
            changed = replace(obj, colour=_pick(rng, free))
    objects = tuple(changed if i == index else other for i, other in enumerate(scene.objects))
    return replace(scene, objects=objects)
