"""The whole flow on a real Prefect server, with toy stages and an MLflow store in a file. Twice the same: test_readme.py."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast
from uuid import UUID

import pytest
from prefect import State, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Pending

from flows.full import full
from flows.promote import promote
from flows.settings import RunSettings
from tasks import promotions, store
from tasks.stages import StageFailed
from tests.flows.checkout import make_checkout, shell_environment
from tests.flows.project import ROOT, make_project, stages_run

ONCE = ["curate", "evaluate aesthetic", "evaluate balanced", "evaluate base", "judge", "prepare"]
ONCE += ["train aesthetic", "train balanced", "validate"]


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(store, "STORE", tmp_path / "store")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = make_project(tmp_path / "project")
    monkeypatch.setattr(store, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


def test_from_prompts_to_a_champion(project: Path) -> None:
    first = full()
    assert (first.verdict, first.candidate, first.version) == ("promoted", "aesthetic", 2)
    assert sorted(stages_run(project)) == sorted(ONCE)
    assert stages_run(project)[:3] == ["curate", "validate", "prepare"]
    assert stages_run(project)[-1] == "judge"


def start_review(client: SyncPrefectClient, deployment: UUID) -> FlowRun:
    """A run of the deployment that a person is to review, in the state in which a worker takes it up."""
    return client.create_flow_run_from_deployment(
        deployment, parameters={"settings": {"mixes": ["balanced"], "promote": "review"}}, state=Pending()
    )


def work_on(client: SyncPrefectClient, run: UUID) -> State:
    """What a worker's process does with a run; the state that it leaves it in."""
    client.set_flow_run_state(run, Pending(), force=True)
    settings = {"settings": RunSettings(mixes=["balanced"], promote="review")}
    with contextlib.suppress(Pause):
        run_flow(full, client.read_flow_run(run), settings, return_type="state")
    state = client.read_flow_run(run).state
    assert state
    return state


def review(version: int) -> None:
    """A run is suspended; its form takes no empty reviewer; who approved and why becomes part of the signed promotion."""
    deployment = cast(UUID, full.to_deployment("reviewed").apply())
    with get_client(sync_client=True) as client:
        run = start_review(client, deployment)
        assert work_on(client, run.id).name == "Suspended"
        nobody = client.resume_flow_run(run.id, {"approve": True, "reason": "better", "reviewer": ""})
        assert nobody.status == SetStateStatus.REJECT and "reviewer" in str(nobody.details)
        client.resume_flow_run(run.id, {"approve": True, "reason": "shapes hold", "reviewer": "Ada"})
        state = work_on(client, run.id)
    assert str(state.message) == "promoted: it passed the gate and a person chose it (shapes hold); it is the first champion"
    entry = promotions.read(store.client(), "textcraftor-tiny").head
    assert entry and (entry.version, entry.by) == (version, "Ada") and "shapes hold" in entry.why


def test_never_registers_nothing_and_manual_and_review_wait_for_a_person(project: Path) -> None:
    """One after the other: the later runs find the stages of the first unchanged."""
    assert full(RunSettings(mixes=["balanced"], promote="never")).verdict == "judged"
    assert not store.client().search_registered_models()

    state = full(RunSettings(mixes=["balanced"], promote="manual"), return_state=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Completed")  # the deployment's page lists no run of another name
    assert str(state.message) == "challenger: a person decides: make promote VERSION=1"
    with get_client(sync_client=True) as client:
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        shown = {a.key: a for a in client.read_artifacts(artifact_filter=of_this_run, limit=50)}
    assert "data:image/png;base64," in str(shown["grid-balanced"].data)
    assert "oracle" in str(shown["scores-balanced"].data)
    assert "-5.0 points" in str(shown["claims-balanced"].data)
    assert "Worse than the base: shape -5.0 points" in str(shown["verdict"].data)
    rule, reason = re.findall(r"^\| oracle.delta .*|^- oracle.delta: passed: .*", str(shown["verdict"].data), re.M)
    assert len(rule) < 40 < len(reason), "Prefect's tables do not wrap, and a phone shows some forty characters"
    review(version=1)
    assert promote(version=1).verdict == "champion stays"


def test_a_gate_that_nobody_passes_promotes_nothing(project: Path) -> None:
    state = full(RunSettings(mixes=["balanced"], overrides={"train": {"steps": 1}}), return_state=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Completed") and str(state.message).startswith("not promoted: ")
    assert "balanced: oracle.delta = 0.009, at least 0.050" in str(state.message)
    assert not store.client().search_model_versions("name = 'textcraftor-tiny'")


def test_broken_prompts_stop_everything_downstream(project: Path) -> None:
    with pytest.raises(StageFailed, match="expect_column_values_to_be_unique"):
        full(RunSettings(overrides={"prompts": {"blocklist": ["break"]}}))
    (variant,) = (project / "runs").iterdir()
    assert stages_run(variant) == ["curate", "validate"]
    assert not (variant / "data/encoders").exists()


def test_the_form_offers_the_profiles() -> None:
    profile = RunSettings.model_json_schema()["properties"]["profile"]
    assert "tiny" in profile["anyOf"][0]["enum"]
    described = RunSettings.model_json_schema()["properties"]
    assert all(field["description"] for field in described.values())


def test_a_run_on_servers_of_ones_own_starts_none(tmp_path: Path, empty_store: Path, server: None) -> None:
    checkout = make_checkout(tmp_path / "checkout", mixes=["balanced"], train={"steps": 1})
    shutil.copyfile(empty_store, tmp_path / "theirs.db")
    with get_client(sync_client=True) as client:
        before = {run.id for run in client.read_flow_runs()}
        env = shell_environment(
            SERVERS="mine", PREFECT_API_URL=str(client.api_url), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'theirs.db'}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "flows.local", "full"],
            cwd=checkout,
            env={**env, "PYTHONPATH": os.pathsep.join((str(checkout), str(ROOT)))},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (3, ""), done.stdout
        assert "Verdict: not promoted" in done.stdout
        (run,) = [run for run in client.read_flow_runs() if run.id not in before]
        assert run.name.startswith("make-full-") and run.deployment_id is None
    assert not list((checkout / ".textcraftor").rglob("*.db")), "no server of its own kept anything"
