"""A gate record made by the gate stage is proven as it stands, and no falsified one is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from tasks.evidence import Unproven, assemble, identity, prove
from tasks.gate import read_verdict
from tasks.workspace import Workspace
from textcraftor.candidate import Candidate
from textcraftor.evaluate.gate import gate
from textcraftor.evaluate.scores import Scores
from textcraftor.layout import BASE, encoder_folder, report_folder, scores_file

PROMPTS, IMAGES = 32, 2


def scores(name: str, digest: str, gain: float) -> Scores:
    """A candidate's scores: the base's plus `gain`."""
    noise = np.random.default_rng(0).normal(0, 0.1, PROMPTS * IMAGES)
    ids = [f"{row:04x}" for row in range(PROMPTS) for _ in range(IMAGES)]
    table = pl.DataFrame(
        {
            "prompt_id": ids,
            "prompt": [f"prompt {each}" for each in ids],
            "seed": range(len(ids)),
            "image_index": list(range(IMAGES)) * PROMPTS,
            "heldout": noise + gain,
            "oracle": noise + gain,
            "diversity": 0.5,
        }
    )
    weights = {
        "judge_weights": {"heldout": {"digest": "b" * 64, "largest": []}},
        "trained_weights": {"clip": {"digest": "c" * 64, "largest": []}},
    }
    return Scores(name, digest, ("heldout", "oracle"), ("clip",), {"inputs": {}, **weights}, table)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the scores of the base, of `balanced`, which passes, and of `aesthetic`, which does not."""
    root = tmp_path_factory.mktemp("gated")
    rules = [
        {"judge": "oracle", "metric": "ci_low", "at_least": 0.05},
        {"judge": "diversity", "metric": "ratio", "at_least": 0.9},
    ]
    params = {
        "mixes": ["balanced", "aesthetic"],
        "evaluate": {"judges": ["heldout", "oracle"], "bootstrap": 100},
        "gate": {
            "rank_by": "heldout",
            "rules": rules,
        },
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    workspace = Workspace(root)
    scores(BASE, "", 0).write(root / scores_file(BASE))
    for name, gain in (("balanced", 0.2), ("aesthetic", 0.01)):
        weights = root / encoder_folder(name) / "text_encoder"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        (weights / "model.safetensors").write_text(f"weights of {name}")
        scores(name, Candidate.find(name, root).digest, gain).write(root / scores_file(name))
        (root / report_folder(name)).mkdir(parents=True)
    gate(workspace.config, root)
    return workspace


def assembled(workspace: Workspace, name: str, folder: Path) -> Path:
    assemble(name, read_verdict.fn(workspace).records[name], workspace, folder)
    return folder


def test_the_record_of_the_gate_stage_is_proven(workspace: Workspace, tmp_path: Path) -> None:
    verdict = read_verdict.fn(workspace)
    record = prove(assembled(workspace, "balanced", tmp_path / "balanced"))
    assert verdict.winner == "balanced"
    assert record == {"candidate": "balanced", **verdict.records["balanced"]}
    assert [rule["rule"] for rule in record["rules"]] == [
        *("oracle.ci_low", "diversity.ratio"),
        *("heldout.held_out", "oracle.held_out"),
    ]
    with pytest.raises(Unproven, match=r"aesthetic did not pass the gate \(oracle.ci_low\)"):
        prove(assembled(workspace, "aesthetic", tmp_path / "aesthetic"))


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Workspace], None]:
    def edit(folder: Path, _: Workspace) -> None:
        path = folder / "evidence/gate.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return edit


def _claim_passed(**rule: object) -> Callable[[Path, Workspace], None]:
    """Claim that the candidate passed, and that its first rule did, with these changes."""

    def claim(record: dict[str, Any]) -> None:
        record["passed"] = True
        record["rules"][0].update(rule)

    return _edit(claim)


def _other_record(folder: Path, workspace: Workspace) -> None:
    shutil.copytree(assembled(workspace, "balanced", folder / "other") / "evidence", folder / "evidence", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("falsify", "why"),
    [
        (_claim_passed(), "did not pass the gate"),
        (_edit(lambda record: record.update(passed=True, rules=[])), "no rule was checked"),
        (_claim_passed(passed=True), "oracle.ci_low"),
        (_claim_passed(passed=True, value=None), "oracle.ci_low"),
        (_claim_passed(passed=True, value=float("inf")), "oracle.ci_low"),
        (_claim_passed(passed="yes"), "its gate record is damaged"),
        (_other_record, "do not belong together"),
    ],
    ids=["passed", "no rules", "rule passed", "no value", "infinite", "not a bool", "another candidate's"],
)
def test_a_candidate_that_failed_cannot_be_made_to_pass(
    workspace: Workspace, tmp_path: Path, falsify: Callable[[Path, Workspace], None], why: str
) -> None:
    folder = assembled(workspace, "aesthetic", tmp_path / "aesthetic")
    falsify(folder, workspace)
    with pytest.raises(Unproven, match=why):
        prove(folder)


@pytest.mark.parametrize(
    "falsify",
    [
        lambda folder, workspace: (folder / "text_encoder/model.safetensors").write_text("other weights"),
        lambda folder, workspace: (folder / "text_encoder/config.json").write_text('{"layers": 1}'),
        lambda folder, workspace: shutil.copy(workspace.scores("aesthetic"), folder / "evidence/scores.parquet"),
        _edit(lambda record: record.update(digest="0" * 64)),
    ],
    ids=["weights", "architecture", "scores", "digest"],
)
def test_evidence_about_other_weights_is_refused(
    workspace: Workspace, tmp_path: Path, falsify: Callable[[Path, Workspace], None]
) -> None:
    folder = assembled(workspace, "balanced", tmp_path / "balanced")
    falsify(folder, workspace)
    with pytest.raises(Unproven, match="do not belong together"):
        prove(folder)


def test_identity_is_of_weights_values_and_verdict(workspace: Workspace, tmp_path: Path) -> None:
    folder = assembled(workspace, "balanced", tmp_path / "balanced")
    path = folder / "evidence/scores.parquet"
    written, key = Scores.read(path), identity(folder)
    replace(written, proof={"code_revision": "another"}).write(path)
    _edit(lambda record: record["rules"][0].update(why="in other words"))(folder, workspace)
    (folder / "evidence/report.html").write_text("another report")
    assert identity(folder) == key
    replace(written, table=written.table.with_columns(pl.col("oracle") + 1e-12)).write(path)
    assert identity(folder) != key
    written.write(path)
    assert identity(folder) == key
    for change in ({"bound": 0.04}, {"value": 0.3}, {"rule": "another"}, {"passed": False}):
        other = shutil.copytree(folder, tmp_path / f"other {next(iter(change))}")
        _edit(lambda record, change=change: record["rules"][0].update(change))(other, workspace)
        assert identity(other) != key, change
