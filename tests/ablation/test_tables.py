"""A small table through the real verbs, on random weights: computed once, resumed, written to the page."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.evaluate.conftest import BRIGHTNESS, write_curated
from textcraftor import cli
from textcraftor.ablation import jobs, rows, workspaces
from textcraftor.ablation.commands import write_table
from textcraftor.ablation.rows import TEXT, UNET, Table
from textcraftor.layout import ABLATIONS, ABLATIONS_PAGE

ONE = {"steps": 2, "batch_size": 2}
PARAMS: dict[str, Any] = {
    "profile": "tiny",
    "mixes": ["balanced"],
    "prompts": {"heldout": 3, "world": "any"},
    "chain": {"num_inference_steps": 2},
    "sampler": {"switch_at": 0.5},
    "rewards": {
        "bright": {"kind": BRIGHTNESS, "path": "made-up/bright"},
        "heldout": {"kind": BRIGHTNESS, "path": "made-up/heldout"},
    },
    "mix": {"balanced": {"bright": 1, "clip": 0, "contrast": 0, "aesthetic": 0, "pickscore": 0, "hpsv2": 0}},
    "prepare": {"batch_size": 2, "shard_rows": 4, "cpu_threads": 1},
    "train": {**ONE, "grad_steps": 1, "num_inference_steps": 2, "decode_size": 2, "allow_without_clip": True},
    "train_unet": {**ONE, "grad_steps": 1},
    "evaluate": {
        **{"prompts": 2, "batch_size": 4, "bootstrap": 20, "judges": ["bright", "heldout"], "heldout_judges": ["heldout"]},
        "diversity_judge": "heldout",
    },
    "gate": {
        "rules": [{"judge": "heldout", "metric": "delta", "at_least": -9}],
        "champion_margin": {"oracle": None},
    },
    "ablation": {"steps": 2, "batch_size": 2, "prompts": 3, "rewards": {"bright": {"bright": 1}}},
}


class Here:
    """An executor that runs each job at once, in the thread of the test."""

    def __init__(self, workers: int) -> None:
        assert workers == 1

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def submit(self, run: Any, job: Any) -> "Future[float]":
        done: Future[float] = Future()
        done.set_result(run(job))
        return done


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that ran, in order. They run in this process, which has imported the libraries already."""
    ran: list[str] = []

    def run(params: Path, *arguments: str, **_: object) -> float:
        ran.append(" ".join(arguments).partition(" --device")[0])
        result = CliRunner().invoke(cli.app, [*arguments, "--params", str(params)])
        if result.exit_code:
            raise SystemExit(str(result.exception))
        (params.parent / workspaces.SECONDS).write_text(json.dumps({"all": 60.0}))
        return 60.0

    monkeypatch.setattr(jobs, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(workspaces, "run", run)
    return ran


@pytest.fixture
def root(tmp_path: Path, base_folder: Path) -> Path:
    shutil.copytree(base_folder, tmp_path / "base")
    params = PARAMS | {"base": {"path": "base", "resolution": 32}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    write_curated(tmp_path, "heldout", [f"a red circle, number {number}" for number in range(3)])
    write_curated(tmp_path, "train", [f"a blue square, number {number}" for number in range(3)])
    return tmp_path


def test_a_table_is_computed_once_resumed_and_written(root: Path, verbs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows.TABLES["table1"]
    labels = ["base", "bright, text encoder", "balanced, UNet", "balanced, text encoder + UNet"]
    short = Table(whole.title, whole.about, lambda config: [row for row in rows.table1(config) if row.label in labels])
    monkeypatch.setattr(rows, "TABLES", {**rows.TABLES, "table1": short})
    params = yaml.safe_load((root / "params.yaml").read_text())
    page = write_table("table1", params, root, 1, "cpu")
    train, evaluate = "prepare", "evaluate --candidate ablated"
    assert verbs == [
        *("prepare", "evaluate --candidate base"),
        *(train, f"{TEXT} --mix ablated"),
        *(train, f"{UNET} --mix ablated"),
        *(train, f"{TEXT} --mix ablated", f"{UNET} --mix ablated"),
        *(evaluate, f"{evaluate}-unet", f"{evaluate}-unet"),
    ]
    record = json.loads((root / ABLATIONS / "table1/table.json").read_text())
    assert [row["label"] for row in record["rows"]] == labels
    means = [row["judges"]["heldout"]["mean"] for row in record["rows"]]
    assert len(set(means)) == 4, "each has trained something else"
    assert record["seconds"] == 7 * 60 and record["prompts"] == 3
    text = page.read_text()
    assert page == root / ABLATIONS_PAGE and "<!-- table1 -->" in text and "balanced, UNet" not in text
    for name in ("table1/plot.png", "table1/pictures.png"):
        assert f"](ablations/{name})" in text and (root / ABLATIONS / name).stat().st_size > 1000

    verbs.clear()
    shutil.rmtree(root / ABLATIONS)
    assert write_table("table1", params, root, 1, "cpu").read_text() == text and not verbs
    (evaluated,) = (root / ".textcraftor/ablations/evaluations").glob("*/data/reports/ablated/metrics.json")
    evaluated.unlink()
    write_table("table1", params, root, 1, "cpu")
    assert verbs == [evaluate], "what is missing is made again, and nothing else"
