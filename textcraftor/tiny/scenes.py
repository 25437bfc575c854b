"""What may stand in a picture of the small world: one or two things, how they stand to each other, and on what."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
SIZES: Final = ("small", "large")
RELATIONS: Final = ("left of", "right of", "above", "below")
BACKGROUNDS: Final = ("white", "grey", "black")
STYLES: Final = ("flat", "glossy")

OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape.  In a scene every field is set; in a claim a field that the prompt leaves open is None."""

    colour: str | None
    shape: str | None
    size: str | None


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's content.

    things: one or two; two things always differ in colour, so that "the red one" is never ambiguous.
    relation: where the first thing stands, seen from the second ("left of", ...); None with one thing.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str
    style: str


def _pick(rng: np.random.Generator, words: tuple[str, ...], but: str | None = None) -> str:
    allowed = [word for word in words if word != but]
    return allowed[int(rng.integers(len(allowed)))]


def sample_scene(rng: np.random.Generator, pair_fraction: float = 0.6) -> Scene:
    """Draw a scene, every word of each vocabulary equally likely; `pair_fraction` of the scenes hold two things."""
    first = Thing(_pick(rng, COLOURS), _pick(rng, SHAPES), _pick(rng, SIZES))
    things: tuple[Thing, ...] = (first,)
    relation = None
    if rng.random() < pair_fraction:
        things = (first, Thing(_pick(rng, COLOURS, but=first.colour), _pick(rng, SHAPES), _pick(rng, SIZES)))
        relation = _pick(rng, RELATIONS)
    return Scene(things, relation, _pick(rng, BACKGROUNDS), _pick(rng, STYLES))


def change_one(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene but for one attribute: the hard negative that teaches a reward to look closely."""
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    fields = ["colour", "shape", "size", "background", "style"] + (["relation", "swap"] if scene.relation else [])
    match fields[int(rng.integers(len(fields)))]:
        case "background":
            return replace(scene, background=_pick(rng, BACKGROUNDS, but=scene.background))
        case "style":
            return replace(scene, style=_pick(rng, STYLES, but=scene.style))
        case "relation":
            return replace(scene, relation=_pick(rng, RELATIONS, but=scene.relation))
        case "swap":
            first, second = scene.things
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            return replace(scene, things=swapped)
        case "size":
            changed = replace(thing, size=_pick(rng, SIZES, but=thing.size))
        case "shape":
            changed = replace(thing, shape=_pick(rng, SHAPES, but=thing.shape))
        case _:
            taken = {other.colour for other in scene.things}
            free = tuple(colour for colour in COLOURS if colour not in taken)
            changed = replace(thing, colour=_pick(rng, free))
    things = tuple(changed if i == index else other for i, other in enumerate(scene.things))
    return replace(scene, things=things)
