"""The tables over seeds, from made-up runs, and the workspaces in which real ones run."""

from pathlib import Path

import polars as pl
import pytest
import yaml

from benchmarks import seeds
from benchmarks.seeds import Run
from textcraftor.ablation import workspaces
from textcraftor.config import load, written

PROMPTS = ["a", "b", "c", "d"]


def run(name: str, oracle: float, shape: int = 30, diversity: float = 0.95) -> Run:
    judges = {
        "clip": {"delta": 0.1, "ci_low": 0.0, "ci_high": 0.2, "trained_on": True},
        "oracle": {"delta": oracle, "ci_low": oracle - 0.02, "ci_high": oracle + 0.03, "trained_on": False},
    }
    claims = {"kind": {"shape": {"held": shape, "of": 100}}, "language": {"plain": {"held": 80, "of": 100}}}
    rules = [
        {"rule": "oracle.delta", "metric": "delta", "bound": 0.05, "value": oracle, "passed": oracle >= 0.05},
        {"rule": "oracle.held_out", "metric": "held_out", "bound": 1.0, "value": 1.0, "passed": True},
    ]
    scores = pl.DataFrame({"prompt_id": PROMPTS, "image_index": [0] * 4, "oracle": [0.5 + oracle] * 4})
    return Run(name, {"n_prompts": 4, "judges": judges, "diversity": {"ratio": diversity}}, claims, rules, scores)


BASE = run("base", 0.0, shape=25)
REWORDED = pl.DataFrame({"prompt_id": PROMPTS, "reworded": [0.9] * 4})


def test_each_figure_has_a_column_for_each_seed_its_mean_and_its_spread() -> None:
    page = seeds.page([run("seed 0", 0.1), run("seed 1", 0.2, shape=20)], [], BASE, REWORDED, "balanced")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in page.splitlines()
        if "|" in line
    }
    assert rows["oracle (points)"] == ["+10 [+8, +13]", "+20 [+18, +23]", "+15", "7.07"]
    assert rows["shape (base 0.250)"] == ["+5.0", "-5.0", "+0", "7.07"]
    assert rows["plain prompts (base 0.800)"] == ["+0.0", "+0.0", "+0", "0"]
    assert rows["share of rewording's gain"] == ["25%", "50%", "+0.375", "0.177"]
    assert "clip" not in rows  # trained on: it proves nothing
    assert "The gate passes 2 of 2 runs" in page


def test_the_margin_is_counted_in_the_larger_spread() -> None:
    table = seeds.margins([run("seed 0", 0.14), run("seed 1", 0.16)], [run("2 threads", 0.15)])
    (row,) = [line for line in table.splitlines() if line.startswith("| oracle.delta")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["0.05", "0.1500", "0.1400", "0.0141", "0.0071", "7.1"]
    assert "held_out" not in table


def test_rewording_that_gains_nothing_leaves_no_share() -> None:
    share = seeds.recovered(run("seed 0", 0.1), BASE.scores, REWORDED.with_columns(reworded=pl.lit(0.4)))
    assert share != share


def test_runs_share_what_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"profile": "tiny", "train": {"steps": 3}}))
    (tmp_path / "data/tiny").mkdir(parents=True)
    settings = {"train": {"seed": 4}}
    for _ in range(2):  # a second time as well: runs are resumed
        made = workspaces.make(
            tmp_path / "seed-4", written(params), settings, {"data/tiny": tmp_path / "data/tiny", "no": tmp_path / "no"}
        )
    assert yaml.safe_load(made.read_text()) == {"profile": "tiny", "train": {"steps": 3, "seed": 4}}
    assert (tmp_path / "seed-4/data/tiny").resolve() == tmp_path / "data/tiny"
    assert not (tmp_path / "seed-4/no").is_symlink()


def test_runs_of_other_settings_or_weights_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "data/tiny/base").mkdir(parents=True)
    weights = tmp_path / "data/tiny/base/weights"
    weights.write_text("one")
    config = load(tmp_path / "params.yaml", profile="tiny")
    other = load(tmp_path / "params.yaml", {"train": {"steps": 7}}, profile="tiny")
    first = workspaces.key(config, tmp_path, "balanced")
    keys = {first, workspaces.key(config, tmp_path, "aesthetic"), workspaces.key(other, tmp_path, "balanced")}
    weights.write_text("another")
    assert len({*keys, workspaces.key(config, tmp_path, "balanced")}) == 4
    weights.write_text("one")
    assert workspaces.key(config, tmp_path, "balanced") == first


def test_a_failing_stage_names_the_reason_and_the_log(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("profile: tinny\n")
    with pytest.raises(SystemExit, match=r"`textcraftor gate` failed in .*log\.txt.*Unknown profile 'tinny'"):
        workspaces.run(params, "gate")
