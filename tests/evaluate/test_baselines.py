"""The cheap rivals of tuning: drawn with the base, judged by what was asked for, and shown beside the candidate."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from tests.evaluate.conftest import Brightness, write_params
from tests.evaluate.test_run import page
from textcraftor import pictures
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import load
from textcraftor.evaluate.baselines import Baselines, best_guidance, draw
from textcraftor.evaluate.generation import from_bytes, plan
from textcraftor.evaluate.run import measure
from textcraftor.evaluate.scores import Scores
from textcraftor.models.base import load_base
from textcraftor.tiny.language import reword
from textcraftor.tiny.oracle import Oracle

CPU = torch.device("cpu")


@pytest.fixture
def workspace(root: Path, base_folder: Path) -> Path:
    base = {"path": str(base_folder), "resolution": 32}
    write_params(root, base=base, baseline_prompts=4, guidance_scales=[1.5], heldout_judges=["heldout"])
    return root


def test_reworded_prompts_are_drawn_and_judged_by_the_originals(workspace):
    config = load(workspace / "params.yaml", {"evaluate": {"guidance_scales": []}})
    base, rows = load_base(config.base, CPU), plan(config, workspace)
    drawn = draw(config, workspace, base, rows, 2, Brightness, CPU)
    first = rows.filter(image_index=0).head(4)
    asked = first["prompt"].to_list()
    assert asked != [reword(prompt) for prompt in asked]
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    images = pictures.to_bytes(sampler.generate([reword(prompt) for prompt in asked], first["seed"].to_list()))
    assert drawn.names == ["reworded"]  # no other scale was tried, so guidance is no rival
    assert drawn.table["prompt_id"].to_list() == first["prompt_id"].to_list()
    assert drawn.table["oracle"].to_list() == pytest.approx(Oracle().score(from_bytes(images), asked).tolist())
    assert list(drawn.pictures["reworded"]) == first["prompt_id"].to_list()[:2]
    shown = pictures.to_tensor(list(drawn.pictures["reworded"].values()))
    assert torch.equal(shown, images[:2])


def test_the_scale_that_the_judge_prefers_on_train_prompts_is_the_rival(workspace):
    config = load(workspace / "params.yaml")
    base = load_base(config.base, CPU)
    best, tried = best_guidance(config, workspace, base, Brightness, CPU)
    assert list(tried) == ["3", "1.5"]
    assert tried[f"{best:g}"] == max(tried.values())
    drawn = draw(config, workspace, base, plan(config, workspace), 2, Brightness, CPU)
    assert drawn.guidance_scale == best
    assert drawn.names == (["reworded"] if best == 3 else ["guidance 1.5", "reworded"])


def test_without_an_oracle_the_gates_judge_chooses(workspace):
    config = load(workspace / "params.yaml", {"evaluate": {"judges": ["bright", "heldout"], "guidance_scales": [1.5]}})
    asked = []

    def judge(name):
        asked.append(name)
        return Brightness(name)

    best_guidance(config, workspace, load_base(config.base, CPU), judge, CPU)
    assert set(asked) == {"heldout"}


def made_up(rows: pl.DataFrame, shown: int = 8) -> Baselines:
    ids = rows.filter(image_index=0).head(4)["prompt_id"]
    table = pl.DataFrame({"prompt_id": [*ids, *ids], "baseline": ["guidance 5"] * 4 + ["reworded"] * 4})
    table = table.with_columns(heldout=pl.lit(0.25), oracle=pl.Series([0.5] * 4 + [0.75] * 4))
    white = Image.new("RGB", (64, 64), "white")
    drawn_for = rows["prompt_id"].unique(maintain_order=True).head(shown)
    images = {name: dict.fromkeys(drawn_for, white) for name in ("guidance 5", "reworded")}
    return Baselines(table, images, 5.0, {"7.5": 0.4, "5": 0.6}, "oracle")


def test_candidates_are_shown_beside_the_rivals(config, root, good, poor):
    rows = plan(config, root)
    measure(config, Candidate("base"), root, rows, poor, None, Brightness, baselines=made_up(rows))
    folder = root / "data/encoders/balanced/text_encoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    base = Scores.read(root / "data/scores/base.parquet")
    report = measure(config, Candidate("balanced", folder), root, rows, good, base, Brightness)
    rivals = json.loads((report / "rivals.json").read_text())
    first = Scores.read(root / "data/scores/balanced.parquet").table.filter(image_index=0).head(4)
    assert rivals["prompts"] == 4
    assert rivals["guidance"] == {"best": 5.0, "tried": {"7.5": 0.4, "5": 0.6}, "chosen_by": "oracle"}
    assert list(rivals["judges"]) == ["heldout", "oracle"]
    assert list(rivals["judges"]["oracle"]) == ["base", "guidance 5", "reworded", "balanced"]
    assert rivals["judges"]["oracle"]["reworded"] == 0.75
    assert rivals["judges"]["oracle"]["balanced"] == pytest.approx(first["oracle"].mean())
    assert "Cheap rivals" in page(report)
    with_rivals = np.asarray(Image.open(report / "grid.png"))
    measure(config, Candidate("base"), root, rows, poor, None, Brightness)
    without = measure(config, Candidate("balanced", folder), root, rows, good, base, Brightness)
    assert not (without / "rivals.json").exists()
    assert with_rivals.shape[0] > np.asarray(Image.open(without / "grid.png")).shape[0] + 2 * pictures.CELL
    assert "Cheap rivals" not in page(without)


def test_rivals_of_fewer_prompts_than_the_grid_shows_have_no_row_in_it(config, root, poor):
    rows = plan(config, root)
    report = measure(config, Candidate("base"), root, rows, poor, None, Brightness, baselines=made_up(rows, shown=2))
    with_some = np.asarray(Image.open(report / "grid.png"))
    without = measure(config, Candidate("base"), root, rows, poor, None, Brightness)
    assert np.array_equal(with_some, np.asarray(Image.open(without / "grid.png")))
