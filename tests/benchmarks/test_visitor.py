"""The table and the pictures of what a visitor types first, on rendered scenes."""

import numpy as np
import torch

from benchmarks import visitor
from textcraftor.evaluate.claims import tick_claims
from textcraftor.tiny.language import parse
from textcraftor.tiny.renderer import render
from textcraftor.tiny.scenes import Scene, SceneObject

PROMPT = visitor.PROMPTS[0]


def rendered(shape: str, count: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    scene = Scene((SceneObject("red", shape, "small"),), None, "white", "flat")
    return torch.from_numpy(np.stack([render(scene, rng) for _ in range(count)])).permute(0, 3, 1, 2)


def test_a_drawing_is_right_when_every_claim_holds_and_all_are_shown() -> None:
    drawn = {PROMPT: {"base": rendered("circle"), "balanced": rendered("cross")}}
    ticks = {PROMPT: {name: tick_claims(images, [PROMPT] * 3) for name, images in drawn[PROMPT].items()}}
    base, balanced = visitor.table(ticks).splitlines()[2:]
    assert "| base | 3 of 3 | 1 object 3, small 3, red 3, circle 3, white 3, flat 3 |" in base
    assert "| balanced | 0 of 3 | 1 object 3, small 3, red 3, circle 0, white 3, flat 3 |" in balanced
    sheet = np.asarray(visitor.sheet(drawn, ticks))
    assert sheet.shape[1] > 3 * visitor.CELL
    red = (sheet == [214, 39, 40]).all(2) | (np.abs(sheet.astype(int) - [214, 39, 40]).max(2) < 12)
    columns = np.flatnonzero(red.any(0))
    assert columns.max() - columns.min() > 2 * visitor.CELL  # a picture for each seed


def test_every_prompt_says_something_that_the_oracle_can_check() -> None:
    assert all(parse(prompt) for prompt in visitor.PROMPTS)
