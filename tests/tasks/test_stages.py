"""A stage run by DVC as a task: its outcome, its errors, and that no process of it is left."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.logging import disable_run_logger

from tasks.environment import grace_seconds, stage_environment
from tasks.stages import (
    StageBusy,
    StageFailed,
    StagePreempted,
    is_retryable,
    parse_outcome,
    repro,
    stage_error,
    stop_stages_on_error,
)
from tests.flows.project import make_project, stages_run
from textcraftor.errors import UserError


def run(stage: str, folder: Path) -> str:
    with disable_run_logger():
        return repro.fn(stage, folder)


def test_a_stage_runs_once_and_is_restored_from_the_cache(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    assert run("curate", project) == "ran"
    assert run("curate", project) == "unchanged"
    (project / "data/prompts/curated/train.txt").unlink()
    (project / "dvc.lock").unlink()
    assert run("curate", project) == "restored"
    assert stages_run(project) == ["curate"]


def test_the_error_of_a_failed_stage_is_its_last_line(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", prompts={"blocklist": ["break"]})
    run("curate", project)
    with pytest.raises(StageFailed) as failed:
        run("validate", project)
    assert str(failed.value) == "validate: textcraftor: expect_column_values_to_be_unique(prompt_id) failed for 3 rows"


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml"])
def test_conflict_markers_are_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    project = make_project(tmp_path / "project")
    present = (project / "dvc.yaml").read_text() if name == "dvc.yaml" else "schema: '2.0'\n"
    (project / name).write_text(f"<<<<<<< HEAD\n{present}=======\n{present}>>>>>>> theirs\n")
    with pytest.raises(StageFailed, match=rf"^curate: \./{name} is no valid YAML\. If git left conflict markers") as failed:
        run("curate", project)
    assert "\n" not in str(failed.value)


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
        with stop_stages_on_error():
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


def test_only_a_busy_or_preempted_stage_is_retried() -> None:
    def state(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(result=lambda raise_on_failure: error)

    busy = stage_error("train@x", 255, ["ERROR: '/w/data/latents' is busy, it is being blocked by:", "  (PID 7): dvc repro"])
    assert isinstance(busy, StageBusy)
    assert str(busy) == "train@x: '/w/data/latents' is busy, it is being blocked by: (PID 7): dvc repro"
    assert is_retryable(None, None, state(busy))
    broken = stage_error(
        "train@x", 2, ["Running stage 'train@x':", "textcraftor: no such mix", "ERROR: failed to reproduce 'train@x'"]
    )
    assert str(broken) == "train@x: textcraftor: no such mix"
    assert not is_retryable(None, None, state(broken))
    for status in (75, -15, 143):
        last = f"ERROR: failed to reproduce 'train@x': failed to run: textcraftor train --mix x, exited with {status}"
        preempted = stage_error("train@x", 255, ["Running stage 'train@x':", "textcraftor: stopped at step 3", last])
        assert isinstance(preempted, StagePreempted)
        assert is_retryable(None, None, state(preempted))
    killed = ["Running stage 'train@x':", "ERROR: failed to reproduce 'train@x': failed to run: textcraftor, exited with -9"]
    assert not isinstance(stage_error("train@x", 255, killed), StagePreempted)
    assert isinstance(stage_error("train@x", 143, ["Running stage 'train@x':"]), StagePreempted)  # dvc itself was sent SIGTERM


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
    assert parse_outcome("train@a", ["noise", line]) == expected


def test_stages_share_the_cores_and_see_no_prefect_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    environment = stage_environment({"PATH": "/bin", "PREFECT_HOME": "x"}, concurrency=3)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "PREFECT_HOME" not in environment
    assert stage_environment({"OMP_NUM_THREADS": "5"}, 3)["OMP_NUM_THREADS"] == "5"
    assert stage_environment({}, 99)["OMP_NUM_THREADS"] == "1"
    assert stage_environment({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, gpu="1")["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in stage_environment({}, 1)


def test_the_grace_is_a_setting_with_minutes_as_default() -> None:
    assert grace_seconds({}) >= 120
    assert grace_seconds({"TEXTCRAFTOR_GRACE_SECONDS": "12.5"}) == 12.5
    with pytest.raises(UserError, match="TEXTCRAFTOR_GRACE_SECONDS=soon is not a number of seconds"):
        grace_seconds({"TEXTCRAFTOR_GRACE_SECONDS": "soon"})
