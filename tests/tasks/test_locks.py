"""What a crash leaves in DVC's record of locks does not block a stage; what a running DVC holds does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.lock import make_lock
from prefect.logging import disable_run_logger

from tasks.locks import drop_dead_locks
from tasks.stages import repro
from tests.flows.project import make_project


@pytest.fixture
def running_dvc() -> Iterator[int]:
    """The ID of a process that looks like one of DVC's."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc repro"])
    yield process.pid
    process.kill()
    process.wait()


def record(workspace: Path, **held: object) -> Path:
    path = workspace / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held))
    return path


DEAD = 2**22 + 1  # greater than any process ID


@pytest.mark.parametrize("pid", [DEAD, os.getppid(), 1])
def test_entries_of_processes_that_are_not_dvcs_are_removed(tmp_path: Path, running_dvc: int, pid: int) -> None:
    gone, held = {"pid": pid, "cmd": "dvc repro"}, {"pid": running_dvc, "cmd": "dvc repro"}
    path = record(tmp_path, write={"/w/a": gone, "/w/b": held}, read={"/w/c": [gone, held], "/w/d": [gone]})
    drop_dead_locks(tmp_path)
    assert json.loads(path.read_text()) == {"write": {"/w/b": held}, "read": {"/w/c": [held]}}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"write": {"/w": {}}}', "null"])
def test_a_record_that_was_cut_off_is_removed(tmp_path: Path, content: str) -> None:
    path = record(tmp_path)
    path.write_text(content)
    drop_dead_locks(tmp_path)
    assert not path.exists()


def test_a_record_that_dvc_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = record(tmp_path)
    path.write_text("")
    with make_lock(str(path.with_name("rwlock.lock"))):
        drop_dead_locks(tmp_path)
    assert path.exists()


def test_a_stage_runs_over_what_a_crash_left(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    record(project).write_text("")
    with disable_run_logger():
        assert repro.fn("curate", project) == "ran"
