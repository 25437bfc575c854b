"""The oracle is right about clean renders, and rejects what was not asked for."""

import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from textcraftor.tiny.language import parse, plain_caption, rich_caption
from textcraftor.tiny.oracle import Oracle, look
from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.scenes import Scene, Thing, change_one


@cache
def gallery(count: int = 600) -> tuple[list[Scene], torch.Tensor]:
    rng = np.random.default_rng(11)
    scenes = corpus.scenes(count, rng)
    return scenes, corpus.pictures(scenes, rng)


def test_clean_renders_keep_their_promises() -> None:
    scenes, images = gallery()
    accuracy = Oracle().accuracy(images, [plain_caption(scene) for scene in scenes])
    assert set(accuracy) == {"count", "colour", "shape", "size", "relation", "background", "style", "all"}
    assert min(accuracy.values()) >= 0.97, accuracy


def test_both_languages_get_the_same_verdict() -> None:
    scenes, images = gallery()
    rng = np.random.default_rng(12)
    score = Oracle().score(images, [rich_caption(scene, rng) for scene in scenes])
    assert score.shape == (len(scenes),)
    assert score.mean() > 0.97


def test_slightly_blurred_and_noisy_pictures_are_still_read() -> None:
    scenes, images = gallery()
    noise = 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    spoiled = (torch.nn.functional.avg_pool2d(images, 3, 1, 1) + noise).clamp(0, 1)
    assert Oracle().accuracy(spoiled, [plain_caption(scene) for scene in scenes])["all"] > 0.95


def test_pictures_of_other_scenes_are_rejected() -> None:
    scenes, images = gallery()
    prompts = [plain_caption(scene) for scene in scenes]
    right, wrong = Oracle().score(images, prompts), Oracle().score(images.roll(1, 0), prompts)
    assert wrong.mean() < 0.45
    assert (wrong == 1).float().mean() < 0.02
    assert (right > wrong).float().mean() > 0.97


def test_one_changed_attribute_is_noticed() -> None:
    scenes, images = gallery()
    rng = np.random.default_rng(13)
    prompts = [plain_caption(change_one(scene, rng)) for scene in scenes]
    assert (Oracle().score(images, prompts) == 1).float().mean() < 0.05


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("colour.1", {"things": (Thing("green", "star", "large"),)}),
        ("shape.1", {"things": (Thing("red", "square", "large"),)}),
        ("size.1", {"things": (Thing("red", "star", "small"),)}),
        ("background", {"background": "black"}),
        ("style", {"style": "flat"}),
    ],
)
def test_only_the_broken_claim_fails(kind: str, changed: dict[str, object]) -> None:
    scene = Scene((Thing("red", "star", "large"),), None, "white", "glossy")
    image = corpus.pictures([scene], np.random.default_rng(0))
    (held,) = Oracle().claims(image, [plain_caption(scene)])
    assert all(held.values())
    (verdicts,) = Oracle().claims(image, [plain_caption(replace(scene, **changed))])
    assert [name for name, holds in verdicts.items() if not holds] == [kind]


def test_relation_and_count() -> None:
    pair = Scene((Thing("red", "circle", "small"), Thing("blue", "cross", "small")), "above", "grey", "flat")
    single = Scene(pair.things[:1], None, "grey", "flat")
    images = corpus.pictures([pair, single], np.random.default_rng(1))
    asked = ["a red circle below a blue cross", "a red circle above a blue cross"]
    turned, missing = Oracle().claims(images, asked)
    assert turned["count"] and turned["colour.2"] and not turned["relation"]
    assert not missing["count"] and not missing["colour.2"] and not missing["relation"] and missing["shape.1"]


def test_prompts_without_claims_have_no_score() -> None:
    _, images = gallery()
    score = Oracle().score(images[:2], ["astronaut riding a horse", "a cross"])
    assert score[0].isnan() and not score[1].isnan()
    assert Oracle().claims(images[:1], [""]) == [{}]


def test_degenerate_pictures_are_no_crash() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), torch.rand(3, 64, 64)])
    images[1, 1:] = 0  # all red: no ground at all
    score = Oracle().score(images, ["a red circle on a white background, glossy"] * 3)
    assert (score < 0.5).all()


def test_other_resolutions_are_read() -> None:
    scenes, images = gallery()
    large = torch.nn.functional.interpolate(images[:100], 256, mode="bicubic")
    assert Oracle().accuracy(large, [plain_caption(scene) for scene in scenes[:100]])["all"] > 0.97


def test_as_many_prompts_as_images() -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        Oracle().score(torch.rand(2, 3, 64, 64), ["a circle"])


def test_oracle_is_fast_enough_for_thousands() -> None:
    _, images = gallery()
    start = time.process_time()
    look(images)
    assert time.process_time() - start < 5  # 600 pictures; about one second on one core
    assert parse("a circle") is not None
