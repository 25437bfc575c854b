"""The oracle accepts renders of the prompt's scene and rejects renders of other scenes."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from textcraftor.tiny.language import plain_caption, rich_caption
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe import batches
from textcraftor.tiny.scenes import Scene, SceneObject, change_one_attribute


@cache
def renders(count: int = 600) -> tuple[list[Scene], torch.Tensor]:
    rng = np.random.default_rng(11)
    scenes = batches.sample_scenes(count, rng)
    return scenes, batches.render_batch(scenes, rng)


def test_claims_hold_on_clean_renders() -> None:
    scenes, images = renders()
    accuracy = Oracle().accuracy(images, [plain_caption(scene) for scene in scenes])
    assert set(accuracy) == {"count", "colour", "shape", "size", "relation", "background", "style", "all"}
    assert min(accuracy.values()) >= 0.97, accuracy


def test_rich_prompts_are_checked_like_plain_ones() -> None:
    scenes, images = renders()
    rng = np.random.default_rng(12)
    score = Oracle().score(images, [rich_caption(scene, rng) for scene in scenes])
    assert score.shape == (len(scenes),)
    assert score.mean() > 0.97


def test_claims_hold_on_slightly_blurred_and_noisy_images() -> None:
    scenes, images = renders()
    noise = 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    degraded = (torch.nn.functional.avg_pool2d(images, 3, 1, 1) + noise).clamp(0, 1)
    assert Oracle().accuracy(degraded, [plain_caption(scene) for scene in scenes])["all"] > 0.95


def test_images_of_other_scenes_are_rejected() -> None:
    scenes, images = renders()
    prompts = [plain_caption(scene) for scene in scenes]
    right, wrong = Oracle().score(images, prompts), Oracle().score(images.roll(1, 0), prompts)
    assert wrong.mean() < 0.45
    assert (wrong == 1).float().mean() < 0.02
    assert (right > wrong).float().mean() > 0.97


def test_a_single_changed_attribute_is_detected() -> None:
    scenes, images = renders()
    rng = np.random.default_rng(13)
    prompts = [plain_caption(change_one_attribute(scene, rng)) for scene in scenes]
    assert (Oracle().score(images, prompts) == 1).float().mean() < 0.05


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("colour.1", {"objects": (SceneObject("green", "star", "large"),)}),
        ("shape.1", {"objects": (SceneObject("red", "square", "large"),)}),
        ("size.1", {"objects": (SceneObject("red", "star", "small"),)}),
        ("background", {"background": "black"}),
        ("style", {"style": "flat"}),
    ],
)
def test_only_the_changed_claim_fails(kind: str, changed: dict[str, object]) -> None:
    scene = Scene((SceneObject("red", "star", "large"),), None, "white", "glossy")
    image = batches.render_batch([scene], np.random.default_rng(0))
    (verdicts,) = Oracle().check_claims(image, [plain_caption(scene)])
    assert all(verdicts.values())
    (verdicts,) = Oracle().check_claims(image, [plain_caption(replace(scene, **changed))])
    assert [name for name, holds in verdicts.items() if not holds] == [kind]


def test_pixels_that_stick_out_of_the_corners_leave_a_square_a_square() -> None:
    scene = Scene((SceneObject("purple", "square", "large"),), None, "black", "flat")
    image = batches.render_batch([scene], np.random.default_rng(0))
    inside = (image[0].amax(0) - image[0].amin(0) > 0.24).nonzero()
    (top, left), (bottom, right) = inside.amin(0), inside.amax(0)
    colour = image[0, :, (top + bottom) // 2, (left + right) // 2][:, None, None]
    for y in (top - 2, bottom + 1):  # guidance exaggerates corners so
        for x in (left - 2, right + 1):
            image[0, :, y : y + 2, x : x + 2] = colour
    image[0, :, top - 1 : bottom + 2, left] = image[0, :, top - 1 : bottom + 2, right] = colour[:, 0]
    (verdicts,) = Oracle().check_claims(image, [plain_caption(scene)])
    assert all(verdicts.values()), verdicts


def test_relation_and_count() -> None:
    pair = Scene((SceneObject("red", "circle", "small"), SceneObject("blue", "cross", "small")), "above", "grey", "flat")
    single = Scene(pair.objects[:1], None, "grey", "flat")
    images = batches.render_batch([pair, single], np.random.default_rng(1))
    prompts = ["a red circle below a blue cross", "a red circle above a blue cross"]
    inverted, missing = Oracle().check_claims(images, prompts)
    assert inverted["count"] and inverted["colour.2"] and not inverted["relation"]
    assert not missing["count"] and not missing["colour.2"] and not missing["relation"] and missing["shape.1"]


def test_prompts_without_claims_have_no_score() -> None:
    _, images = renders()
    score = Oracle().score(images[:2], ["astronaut riding a horse", "a cross"])
    assert score[0].isnan() and not score[1].isnan()
    assert Oracle().check_claims(images[:1], [""]) == [{}]


def test_degenerate_images_get_a_low_score() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), torch.rand(3, 64, 64)])
    images[1, 1:] = 0  # all red: no background
    score = Oracle().score(images, ["a red circle on a white background, glossy"] * 3)
    assert (score < 0.5).all()


def test_other_resolutions_are_resized() -> None:
    scenes, images = renders()
    large = torch.nn.functional.interpolate(images[:100], 256, mode="bicubic")
    assert Oracle().accuracy(large, [plain_caption(scene) for scene in scenes[:100]])["all"] > 0.97


def test_different_numbers_of_images_and_prompts_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        Oracle().score(torch.rand(2, 3, 64, 64), ["a circle"])
