"""The table of diversity measures, on rendered scenes instead of generated ones."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import diversity
from textcraftor.config import load
from textcraftor.pictures import to_bytes
from textcraftor.tiny.diversity import true_scene
from textcraftor.tiny.language import parse, sample_prompts
from textcraftor.tiny.recipe.batches import render_batch

ROOT = Path(__file__).parents[2]
PROMPTS = sample_prompts(6, 0)


def test_the_table_tells_one_noise_for_all_images_from_right_pictures() -> None:
    config = load(ROOT / "params.yaml")
    config = config.model_copy(update={"rewards": {"layout": config.rewards["layout"]}})
    prompts, rng = [prompt for prompt in PROMPTS for _ in range(4)], np.random.default_rng(0)
    images = to_bytes(render_batch([true_scene(parse(prompt), rng) for prompt in prompts], rng))
    drawn = {diversity.TRUTH: images, diversity.BASE: images, diversity.SAME_NOISE: images[::4].repeat_interleave(4, 0)}
    measures, kinds = diversity.measure(config, ROOT, prompts, drawn).split("\n\n")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in measures.splitlines()}
    assert rows[""] == ["claims that hold", "oracle_diversity", "oracle_variety", "layout"]
    assert [float(cell) for cell in rows["truth"]] == pytest.approx([1, 1, 1, 1], abs=0.35)
    assert rows["same noise"][1] == "0.00"
    assert float(rows["same noise"][3]) == pytest.approx(0, abs=0.01)
    assert "open:" in kinds
    assert all(line.count("|") == kinds.splitlines()[0].count("|") for line in kinds.splitlines())
