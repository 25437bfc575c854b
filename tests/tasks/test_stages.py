"""A stage through DVC: what it did, how it fails, and that nothing of it is left."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.logging import disable_run_logger

from tasks.stages import (
    StageBusy,
    StageFailed,
    failure,
    none_left_behind,
    only_if_busy,
    outcome,
    repro,
    stage_environment,
)
from tests.flows.project import make_project, stages_run


def run(stage: str, folder: Path) -> str:
    with disable_run_logger():
        return repro.fn(stage, folder)


def test_a_stage_runs_once_and_comes_back_from_the_cache(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    assert run("curate", project) == "ran"
    assert run("curate", project) == "unchanged"
    (project / "data/prompts/curated/train.txt").unlink()
    (project / "dvc.lock").unlink()
    assert run("curate", project) == "restored"
    assert stages_run(project) == ["curate"]


def test_a_failed_stage_speaks_in_its_own_last_line(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", prompts={"blocklist": ["break"]})
    run("curate", project)
    with pytest.raises(StageFailed) as failed:
        run("validate", project)
    assert str(failed.value) == "validate: textcraftor: expect_column_values_to_be_unique(prompt_id) failed for 3 rows"


def test_a_stage_without_its_inputs_says_what_is_missing(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    with pytest.raises(StageFailed, match="data/prompts/curated"):
        run("validate", project)


def test_leaving_by_an_exception_ends_the_stage(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (project / "slow").touch()
    ended: list[BaseException] = []

    def stage() -> None:
        try:
            run("curate", project)
        except StageFailed as error:
            ended.append(error)

    thread = threading.Thread(target=stage)

    def leave() -> None:
        with none_left_behind():
            thread.start()
            while not stages_run(project):
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    thread.join(20)
    assert not thread.is_alive()
    assert len(ended) == 1
    (project / "slow").unlink()
    assert run("curate", project) == "ran"  # nothing holds the workspace


def test_only_a_busy_workspace_is_retried() -> None:
    def state(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(result=lambda raise_on_failure: error)

    busy = failure("train@x", 255, ["ERROR: '/w/data/latents' is busy, it is being blocked by:", "  (PID 7): dvc repro"])
    assert isinstance(busy, StageBusy)
    assert only_if_busy(None, None, state(busy))
    broken = failure(
        "train@x", 2, ["Running stage 'train@x':", "textcraftor: no such mix", "ERROR: failed to reproduce 'train@x'"]
    )
    assert str(broken) == "train@x: textcraftor: no such mix"
    assert not only_if_busy(None, None, state(broken))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Running stage 'train@a':", "ran"),
        ("Stage 'train@a' is cached - skipping run, checking out outputs", "restored"),
        ("Stage 'train@a' didn't change, skipping", "unchanged"),
        ("Running stage 'train@ab':", "unchanged"),
    ],
)
def test_outcome(line: str, expected: str) -> None:
    assert outcome("train@a", ["noise", line]) == expected


def test_the_cores_are_shared_and_prefect_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    environment = stage_environment({"PATH": "/bin", "PREFECT_HOME": "x"}, side_by_side=3)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "PREFECT_HOME" not in environment
    assert stage_environment({"OMP_NUM_THREADS": "5"}, 3)["OMP_NUM_THREADS"] == "5"
    assert stage_environment({}, 99)["OMP_NUM_THREADS"] == "1"
