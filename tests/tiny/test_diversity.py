"""Diversity as the oracle reads it: agreement with the prompt is no collapse, and collapse is no agreement."""

import dataclasses

import numpy as np
import pytest
import torch

from textcraftor.errors import PromptError
from textcraftor.tiny.diversity import KINDS, open_by_kind, open_diversity, true_scene, variety, variety_by_kind
from textcraftor.tiny.language import parse, sample_prompts
from textcraftor.tiny.oracle import check_claims, detect
from textcraftor.tiny.renderer import render

IMAGES = 4
PROMPTS = sample_prompts(24, 0)
EACH = [prompt for prompt in PROMPTS for _ in range(IMAGES)]


def rendered(prompts, rng):
    drawn = np.stack([render(true_scene(parse(prompt), rng), rng) for prompt in prompts])
    return detect(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255)


@pytest.fixture(scope="module")
def right():
    return rendered(EACH, np.random.default_rng(1))


def test_right_pictures_have_both_at_one(right):
    assert open_diversity(right, EACH, IMAGES).mean() == pytest.approx(1, abs=0.15)
    assert variety(right, EACH, IMAGES).mean() == pytest.approx(1, abs=0.1)
    assert list(variety_by_kind(right, EACH, IMAGES)) == list(KINDS)


def test_one_picture_for_each_prompt_has_no_open_diversity_but_all_the_variety(right):
    repeated = [scene for scene in right[::IMAGES] for _ in range(IMAGES)]
    assert open_diversity(repeated, EACH, IMAGES).max() == 0
    assert variety(repeated, EACH, IMAGES).mean() > 0.8


@pytest.mark.parametrize("objects", [1, 2])
def test_one_picture_for_all_prompts_has_neither(right, objects):
    alike = [next(scene for scene in right if len(scene.objects) == objects)] * len(EACH)
    assert open_diversity(alike, EACH, IMAGES).max() == 0
    assert variety(alike, EACH, IMAGES).max() == 0


def test_an_empty_picture_for_all_prompts_has_neither(right):
    empty = detect(torch.full((1, 3, 64, 64), 0.96)) * len(EACH)
    assert open_diversity(empty, EACH, IMAGES).max() == 0
    assert variety(empty, EACH, IMAGES).max() == 0


def test_a_style_that_every_picture_takes_on_is_a_loss_of_variety(right):
    rng = np.random.default_rng(2)
    glossy = rendered([prompt.split(",")[0] + ", glossy" for prompt in sample_prompts(24, 0, rich_fraction=0)] * IMAGES, rng)
    kinds = variety_by_kind(glossy, EACH, IMAGES)
    assert variety(glossy, EACH, IMAGES).mean() == kinds["style"].mean() < 0.1
    assert kinds["colour"].mean() == pytest.approx(1, abs=0.1)


def test_right_pictures_do_not_lose_by_agreeing_with_the_prompt_where_mistakes_differ(right):
    """Half the pictures draw another prompt: four different mistakes are no more diverse than four right pictures."""
    wrong = [scene if number % 2 else right[(number + 5 * IMAGES) % len(right)] for number, scene in enumerate(right)]
    assert open_diversity(right, EACH, IMAGES).mean() >= open_diversity(wrong, EACH, IMAGES).mean() - 0.1


def test_pictures_that_scatter_more_than_right_ones_have_no_more_diversity(right):
    """In every second picture one of two objects is missing: the pictures differ more, and none of that was asked for."""
    pairs = [number for number in range(0, len(EACH), IMAGES) if len(parse(EACH[number]).objects) == 2]
    prompts = [EACH[start] for start in pairs for _ in range(IMAGES)]
    whole = [right[start + image] for start in pairs for image in range(IMAGES)]
    broken = [dataclasses.replace(scene, objects=scene.objects[image % 2 :][:1]) for image, scene in enumerate(whole)]
    raw = [open_by_kind(scenes, prompts, IMAGES)["place"].mean() for scenes in (whole, broken)]
    assert raw[1] > raw[0] + 0.3
    assert open_diversity(broken, prompts, IMAGES).max() == 1
    assert open_diversity(whole, prompts, IMAGES).mean() >= open_diversity(broken, prompts, IMAGES).mean() - 0.1


def test_what_a_prompt_does_not_name_is_open():
    rng = np.random.default_rng(0)
    prompt = "a small red circle"
    free = rendered([prompt] * 16, rng)
    fixed = rendered(["a small red circle on a black background, glossy"] * 16, rng)
    assert open_diversity(free, [prompt] * 16, 16)[0] == pytest.approx(1, abs=0.2)
    opened = {kind for kind, values in open_by_kind(free, [prompt] * 16, 16).items() if np.isfinite(values).all()}
    assert opened == {"place", "background", "style"}
    assert open_diversity(fixed, [prompt] * 16, 16)[0] == pytest.approx(1 / 3, abs=0.15)  # of place, background, style


def test_prompts_that_all_ask_for_the_same_cannot_lose_variety_in_it():
    prompts = [f"a small red circle on a {colour} background, flat" for colour in ("white", "grey", "black") for _ in range(4)]
    scenes = rendered(prompts, np.random.default_rng(0))
    assert list(variety_by_kind(scenes, prompts, 4)) == ["background"]
    assert variety(scenes, prompts, 4).mean() == pytest.approx(1, abs=0.01)


def test_a_right_scene_exists_for_claims_that_name_one_colour_twice():
    claims = parse("a red circle left of a red square")
    scene = true_scene(claims, np.random.default_rng(0))
    assert [obj.colour for obj in scene.objects] == ["red", "red"]
    (found,) = rendered(["a small blue star above a large red cross on a white background, flat"], np.random.default_rng(0))
    assert all(check_claims(found, parse("a small blue star above a large red cross")).values())


def test_a_prompt_without_claims_has_no_open_diversity(right):
    values = open_diversity(right[:8], ["a cat"] * 4 + EACH[:4], 4)
    assert np.isnan(values[:4]).all()
    assert np.isfinite(values[4:]).all()


def test_prompts_that_all_ask_for_one_picture_have_no_variety_to_measure(right):
    prompt = "a small red circle on a white background, flat"
    with pytest.raises(PromptError, match="All prompts ask for the same picture"):
        variety(right[:8], [prompt] * 8, 4)
