"""Drawn images as annotators see them: what they show, how they are captioned and chosen between."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures import random_pipeline
from textcraftor.tiny.language import parse, plain_caption
from textcraftor.tiny.oracle import detect
from textcraftor.tiny.recipe import batches
from textcraftor.tiny.recipe.drawings import Drawings, described_scene, make_drawings, sample_described
from textcraftor.tiny.recipe.preferences import GROUP_P, sample_drawn_pairs
from textcraftor.tiny.scenes import Scene, change_one_attribute

CPU = torch.device("cpu")


def rendered(scenes: list[list[Scene]], prompts: list[str]) -> Drawings:
    """Renders in place of drawings: P lists of K scenes."""
    images = batches.render_batch([scene for row in scenes for scene in row], np.random.default_rng(0))
    detected = detect(images)
    columns = len(scenes[0])
    table = [detected[start : start + columns] for start in range(0, len(detected), columns)]
    return Drawings(prompts, (images * 255).round().byte().view(len(scenes), columns, 3, 64, 64), table)


@pytest.fixture(scope="module")
def right_and_wrong() -> Drawings:
    """Two images a prompt: one that shows it, and one with two attributes changed."""
    rng = np.random.default_rng(0)
    scenes = batches.sample_scenes(60, rng)
    wrong = [change_one_attribute(change_one_attribute(scene, rng), rng) for scene in scenes]
    return rendered([list(pair) for pair in zip(scenes, wrong, strict=True)], [plain_caption(scene) for scene in scenes])


def test_a_described_scene_is_what_was_rendered() -> None:
    scenes = batches.sample_scenes(100, np.random.default_rng(1))
    found = [described_scene(each) for each in detect(batches.render_batch(scenes, np.random.default_rng(2)))]
    for scene, described in zip(scenes, found, strict=True):
        assert described is not None
        assert set(described.objects) == set(scene.objects)
        assert (described.background, described.style) == (scene.background, scene.style)
        if described.objects == scene.objects:
            assert described.relation == scene.relation


def test_an_empty_image_is_not_described() -> None:
    assert described_scene(detect(torch.full((1, 3, 64, 64), 0.5))[0]) is None


def test_described_images_come_with_their_scenes(right_and_wrong: Drawings) -> None:
    images, scenes = sample_described(right_and_wrong, 16, np.random.default_rng(0))
    assert len(images) == len(scenes) == 16
    assert [described_scene(each) for each in detect(images)] == scenes


def test_annotators_mostly_choose_the_right_image_and_not_always(right_and_wrong: Drawings) -> None:
    pairs = sample_drawn_pairs(GROUP_P, right_and_wrong, 400, np.random.default_rng(0), CPU)
    right = 0
    for images, prompt, chosen in zip(pairs.images, pairs.prompts, pairs.chosen, strict=True):
        row = right_and_wrong.prompts.index(prompt)
        right += int(torch.equal((images[chosen] * 255).round().byte(), right_and_wrong.images[row, 0]))
    assert 0.7 < right / 400 < 0.98


def test_misreading_lowers_a_perfect_fidelity(right_and_wrong: Drawings) -> None:
    rng = np.random.default_rng(0)
    exact = [right_and_wrong.fidelity(row, 0, 0.0, rng) for row in range(60)]
    misread = [right_and_wrong.fidelity(row, 0, 0.5, rng) for row in range(60)]
    assert min(exact) == 1 and 0.4 < float(np.mean(misread)) < 0.6


def test_drawings_are_made_once_and_depend_on_the_seed(tmp_path: Path) -> None:
    pipeline = random_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.config.sample_size = 8  # its autoencoder has a factor of 8, and the tiny world 64 pixels
    first = make_drawings(lambda: [pipeline], 2, 1, 0, tmp_path / "a.safetensors")
    assert first.images.shape == (2, 4, 3, 64, 64) and len(first.detected) == 2 and len(first.detected[0]) == 4
    assert all(parse(prompt) for prompt in first.prompts)
    again = make_drawings(list, 2, 1, 0, tmp_path / "a.safetensors")
    assert torch.equal(again.images, first.images)
    other = make_drawings(lambda: [pipeline], 2, 1, 1, tmp_path / "b.safetensors")
    assert other.prompts != first.prompts
