"""The table of a blend's judges, on scores that are known."""

from pathlib import Path

import numpy as np
import polars as pl

from benchmarks import blend
from textcraftor.config import load

ROOT = Path(__file__).parents[2]
STRENGTHS = (0.0, 0.5, 1.0)


def test_the_table_says_what_rises_and_what_leaves_the_ends() -> None:
    config = load(ROOT / "params.yaml")
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"judges": ("oracle", "clip"), "bootstrap": 200})}
    )
    rng = np.random.default_rng(0)
    rows = {
        "prompt_id": [f"{row // 4:04}" for row in range(160)],
        "image_index": [row % 4 for row in range(160)],
        "seed": [*range(160)],
    }
    noise = rng.normal(0, 0.01, 160)
    scored = [
        pl.DataFrame({**rows, "oracle": 0.5 + gain + noise, "clip": 0.2 + other + noise, "diversity": 0.3})
        for gain, other in ((0.0, 0.0), (0.1, 0.3), (0.2, 0.1))
    ]
    *_, last, spearman, between = blend.report(config, scored, STRENGTHS).splitlines()
    assert spearman == "| Spearman | +1.00 | +0.50 |" and between == "| between the ends | yes | no |"
    assert last.startswith("| 1 | ") and "(+0.2000 .. +0.2000)" in last


def test_the_ends_are_the_encoders_themselves() -> None:
    assert blend.weights_at("original", "balanced", 0.0).stages(0, 5) == [(0, {"original": 1.0})]
    assert blend.weights_at("a", "b", 1.0).stages(0, 5) == [(0, {"b": 1.0})]
