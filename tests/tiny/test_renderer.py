"""What is drawn is what the scene says, and always the same."""

import numpy as np
import pytest

from textcraftor.tiny.renderer import EXTENT, GROUND, PALETTE, place, render
from textcraftor.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, sample_scene


def test_rendering_is_deterministic() -> None:
    scene = sample_scene(np.random.default_rng(3))
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_colours_are_where_they_belong(colour: str, background: str) -> None:
    picture = render(Scene((Thing(colour, "square", "large"),), None, background, "flat"), np.random.default_rng(0)).astype(int)
    near = lambda target: np.abs(picture - np.asarray(target)).max(-1) < 16  # noqa: E731
    inside, outside = near(PALETTE[colour]).mean(), near(GROUND[background]).mean()
    assert 0.1 < inside < 0.3
    assert inside + outside > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_extent(shape: str) -> None:
    for size, (low, high) in EXTENT.items():
        picture = render(Scene((Thing("red", shape, size),), None, "black", "flat"), np.random.default_rng(5), size=128)
        columns = np.flatnonzero((picture[..., 0] > 110).any(0))
        width = (columns[-1] - columns[0] + 1) / 128
        assert 0.88 * low < width < 1.08 * high


def test_things_keep_their_relation_apart_and_inside() -> None:
    rng = np.random.default_rng(6)
    for _ in range(2000):
        scene = sample_scene(rng, pair_fraction=1.0)
        first, second = place(scene, rng)
        dx, dy = second.x - first.x, second.y - first.y
        along, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
        assert (along > 0) == (scene.relation in ("left of", "above"))
        assert abs(along) > abs(across)
        assert abs(along) > (first.extent + second.extent) / 2
        for spot in (first, second):
            assert spot.extent / 2 <= min(spot.x, spot.y, 1 - spot.x, 1 - spot.y)


def test_glossy_is_not_flat() -> None:
    flat, glossy = (
        render(Scene((Thing("blue", "circle", "large"),), None, "grey", style), np.random.default_rng(7))
        for style in ("flat", "glossy")
    )
    assert glossy.min(-1).max() > 200 > flat.min(-1).max()
