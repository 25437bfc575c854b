"""Rendered pixels match their scene and are deterministic."""

import numpy as np
import pytest

from textcraftor.tiny.renderer import BACKGROUND_COLOURS, OBJECT_COLOURS, WIDTH_RANGES, render, sample_placements
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject, sample_scene


def test_rendering_is_deterministic() -> None:
    scene = sample_scene(np.random.default_rng(3))
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_object_and_background_have_their_colours(colour: str, background: str) -> None:
    picture = render(
        Scene((SceneObject(colour, "square", "large"),), None, background, "flat"), np.random.default_rng(0)
    ).astype(int)
    near = lambda target: np.abs(picture - np.asarray(target)).max(-1) < 16  # noqa: E731
    inside, outside = near(OBJECT_COLOURS[colour]).mean(), near(BACKGROUND_COLOURS[background]).mean()
    assert 0.1 < inside < 0.3
    assert inside + outside > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_width_of_their_size(shape: str) -> None:
    for size, (low, high) in WIDTH_RANGES.items():
        picture = render(Scene((SceneObject("red", shape, size),), None, "black", "flat"), np.random.default_rng(5), size=128)
        columns = np.flatnonzero((picture[..., 0] > 110).any(0))
        width = (columns[-1] - columns[0] + 1) / 128
        assert 0.88 * low < width < 1.08 * high


def test_placements_satisfy_the_relation_inside_the_frame_without_overlap() -> None:
    rng = np.random.default_rng(6)
    for _ in range(2000):
        scene = sample_scene(rng, pair_fraction=1.0)
        first, second = sample_placements(scene, rng)
        dx, dy = second.x - first.x, second.y - first.y
        along, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
        assert (along > 0) == (scene.relation in ("left of", "above"))
        assert abs(along) > abs(across)
        assert abs(along) > (first.width + second.width) / 2
        for placement in (first, second):
            assert placement.width / 2 <= min(placement.x, placement.y, 1 - placement.x, 1 - placement.y)


def test_only_glossy_objects_have_a_highlight() -> None:
    flat, glossy = (
        render(Scene((SceneObject("blue", "circle", "large"),), None, "grey", style), np.random.default_rng(7))
        for style in ("flat", "glossy")
    )
    assert glossy.min(-1).max() > 200 > flat.min(-1).max()
