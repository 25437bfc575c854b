"""The whole flow on a real Prefect server, with toy stages and an MLflow store in a file. Twice the same: test_readme.py."""

import re
import shutil
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.full import full
from flows.promote import promote
from flows.settings import RunSettings
from tasks import store
from tasks.stages import StageFailed
from tests.flows.project import make_project, stages_run

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


def test_never_registers_nothing_and_manual_waits_for_a_person(project: Path) -> None:
    """One after the other: the second run finds the stages of the first unchanged."""
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
    assert promote(version=1).verdict == "promoted"


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
