"""Versions with their proof: registered once, promoted only when proven, fetched only when proven."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import registry, tracking
from tasks.evidence import Unproven
from tasks.gate import Verdict, read_verdict
from tasks.registry import challenge, fetch, promote, register
from tasks.tracking import track
from tasks.workspace import Workspace
from tests.flows.project import make_project
from textcraftor.errors import ModelError

MODEL = "textcraftor-tiny"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(tracking, "STORE", tmp_path / "store")
    monkeypatch.setattr(registry, "MODELS", tmp_path / "models")
    return tracking.client()


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Toy projects run up to the gate, by train.steps: the higher, the better the models."""
    projects = {}
    for steps in (1, 200, 300):
        folder = make_project(tmp_path_factory.mktemp("judged") / str(steps), train={"steps": steps}, mixes=["balanced"])
        stages = "toy.evaluate('base'); toy.train('balanced'); toy.evaluate('balanced'); toy.judge()"
        subprocess.run([sys.executable, "-c", f"import toy; {stages}"], cwd=folder, check=True)
        projects[steps] = folder
    return projects


@pytest.fixture
def workspaces(judged: dict[int, Path], tmp_path: Path) -> dict[int, Workspace]:
    """Copies, so that a test may tamper with them."""
    return {steps: Workspace(Path(shutil.copytree(folder, tmp_path / f"steps-{steps}"))) for steps, folder in judged.items()}


def enter(workspace: Workspace) -> int:
    """Track and register the workspace's candidate; its version."""
    record = read_verdict.fn(workspace).records["balanced"]
    return register.fn("balanced", track.fn("balanced", record, workspace), record, workspace)


def holder(store: MlflowClient, alias: str) -> str | None:
    version = store.get_registered_model(MODEL).aliases.get(alias)
    return None if version is None else str(version)


def test_the_same_candidate_is_one_run_and_one_version(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    assert [enter(workspaces[200]), enter(workspaces[200])] == [1, 1]
    assert enter(workspaces[300]) == 2
    assert len(store.search_model_versions(f"name = '{MODEL}'")) == 2
    experiment = store.get_experiment_by_name(MODEL)
    runs = store.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    data = next(run.data for run in runs if run.data.params["train.steps"] == "200")
    assert data.metrics["oracle/delta"] == pytest.approx(0.208)
    assert data.metrics["train/loss"] == 0.5
    assert data.tags["gate"] == "passed"


def test_a_failed_candidate_is_history_but_no_version(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    verdict = read_verdict.fn(workspaces[1])
    assert verdict.winner is None
    assert verdict.failed_rules() == ["balanced: oracle.delta = 0.0090, at least 0.0500"]
    run = track.fn("balanced", verdict.records["balanced"], workspaces[1])
    assert store.get_run(run).data.tags["gate"] == "failed"
    with pytest.raises(Unproven, match="did not pass"):
        register.fn("balanced", run, verdict.records["balanced"], workspaces[1])


def test_weights_changed_after_the_gate_are_refused(workspaces: dict[int, Workspace]) -> None:
    (workspaces[200].folder / "data/encoders/balanced/text_encoder/model.safetensors").write_text("others")
    with pytest.raises(Unproven, match="balanced: its weights have digest"):
        read_verdict.fn(workspaces[200])


def test_champions_come_and_stay(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    config = workspaces[200].config.model_copy(
        update={"gate": workspaces[200].config.gate.model_copy(update={"champion_margin": {"oracle": 0.02}})}
    )
    worse, better = enter(workspaces[200]), enter(workspaces[300])
    assert challenge.fn(better, config).verdict == "challenger"
    assert holder(store, "challenger") == str(better)
    assert promote.fn(better, config).verdict == "promoted"
    assert (holder(store, "champion"), holder(store, "challenger")) == (str(better), None)
    assert challenge.fn(better, config).verdict == "champion stays"
    refused = promote.fn(worse, config)
    assert (refused.verdict, holder(store, "champion")) == ("not promoted", str(better))
    assert "champion.oracle" in refused.why
    by_hand = promote.fn(worse, config, by_hand=True)
    assert (by_hand.verdict, holder(store, "champion")) == ("promoted", str(worse))
    recorded = json.loads(store.get_model_version(MODEL, str(worse)).tags["against_champion"])
    assert [rule["passed"] for rule in recorded] == [False]


def test_fetch_gives_the_weights_as_they_were_judged(workspaces: dict[int, Workspace], store: MlflowClient) -> None:
    config = workspaces[200].config
    promote.fn(enter(workspaces[200]), config)
    folder = fetch("champion", config)
    assert folder == fetch("1", config)
    trained = workspaces[200].folder / "data/encoders/balanced/text_encoder/model.safetensors"
    assert (folder / "text_encoder/model.safetensors").read_bytes() == trained.read_bytes()
    assert "**Gate: passed.**" in (folder / "MODEL_CARD.md").read_text()


def test_an_unknown_version_lists_what_there_is(workspaces: dict[int, Workspace], store: MlflowClient) -> None:
    enter(workspaces[200])
    with pytest.raises(ModelError, match=r"no version 'champion' in the registry\. Known: 1"):
        fetch("champion", workspaces[200].config)


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", "evidence/gate.json", "evidence/scores.parquet"])
def test_whoever_tampers_opens_nothing(
    part: str, store: MlflowClient, workspaces: dict[int, Workspace], tmp_path: Path
) -> None:
    """In MLflow's own store, behind our back: neither promotion nor use."""
    config = workspaces[200].config
    version = enter(workspaces[200])
    other = fetch(str(enter(workspaces[300])), config)
    shutil.rmtree(tmp_path / "models")
    (stored,) = (tmp_path / "store/artifacts").glob(f"{store.get_model_version(MODEL, '1').run_id}/artifacts/candidate")
    if part == "evidence/gate.json":
        record = json.loads((stored / part).read_text())
        (stored / part).write_text(json.dumps({**record, "digest": "0" * 64}))
    else:
        shutil.copyfile(_part_of(workspaces[300], part), stored / part)
    store.set_registered_model_alias(MODEL, "champion", str(version))
    for attempt in (lambda: promote.fn(version, config, by_hand=True), lambda: fetch("champion", config)):
        with pytest.raises(Unproven):
            attempt()
    assert other.name.startswith("2-")


def _part_of(workspace: Workspace, part: str) -> Path:
    if part == "evidence/scores.parquet":
        return workspace.scores("balanced")
    return workspace.folder / "data/encoders/balanced" / part


def test_a_version_of_somebody_else_is_no_champion(store: MlflowClient, workspaces: dict[int, Workspace]) -> None:
    config = workspaces[200].config
    store.create_registered_model(MODEL)
    foreign = store.create_model_version(MODEL, source=str(workspaces[1].folder))
    store.set_registered_model_alias(MODEL, "champion", foreign.version)
    with pytest.raises(Unproven, match="carries no proof"):
        fetch("champion", config)
    with pytest.raises(Unproven, match="carries no proof"):
        promote.fn(int(foreign.version), config, by_hand=True)
    decision = promote.fn(enter(workspaces[200]), config)
    assert (decision.verdict, holder(store, "champion")) == ("promoted", "2")
    assert "not proven" in decision.why


def test_a_half_logged_run_is_taken_up_again(
    store: MlflowClient, workspaces: dict[int, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_verdict.fn(workspaces[200]).records["balanced"]
    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(MlflowClient, "log_artifacts", lambda *_: (_ for _ in ()).throw(ConnectionError()))
        track.fn("balanced", record, workspaces[200])
    run = track.fn("balanced", record, workspaces[200])
    assert store.get_run(run).info.status == "FINISHED"
    assert (fetch(str(register.fn("balanced", run, record, workspaces[200])), workspaces[200].config)).is_dir()


def test_verdict_without_a_winner_says_why() -> None:
    rule = {"rule": "heldout.ci_low", "value": None, "bound": 0.0, "passed": False, "why": "no scores"}
    assert Verdict(None, {"a": {"rules": [rule]}}).failed_rules() == ["a: heldout.ci_low = nothing, at least 0.0000"]
