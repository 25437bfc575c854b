"""DVC stages as Prefect tasks: DVC decides what is computed, Prefect only when.

A stage runs as `dvc repro -s STAGE` in a process group of its own that cannot outlive the flow.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks import guard
from textcraftor.errors import UserError

Outcome = Literal["ran", "restored", "unchanged"]

DVC = [sys.executable, "-m", "dvc"]
CHATTER = ("Updating lock file", "Generating lock file", "Use `dvc push`", "> ")
QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}

_running: set["subprocess.Popen[str]"] = set()
_lock = threading.Lock()


class StageFailed(UserError):
    """A stage ended with an error; the message is the stage's own last line."""


class StageBusy(StageFailed):
    """Another process holds the stage or the workspace; waiting helps."""


def only_if_busy(task: Any, task_run: Any, state: Any) -> bool:
    """Retry only what a retry can cure: a lock that someone else holds."""
    return isinstance(state.result(raise_on_failure=False), StageBusy)


@task(
    task_run_name="{stage}",
    retries=10,
    retry_delay_seconds=6,
    retry_condition_fn=only_if_busy,
    cache_policy=NO_CACHE,
)
def repro(stage: str, folder: Path, side_by_side: int = 1) -> Outcome:
    """Bring one stage of the workspace at `folder` up to date, its output streamed into the log.

    side_by_side: how many stages share the machine; its cores are divided among them.
    Returns what DVC did: "ran" it, "restored" its outputs from the cache, or found it "unchanged".
    Raises StageFailed with the stage's last line, StageBusy (retried) when the workspace is locked.
    """
    logger = get_run_logger()
    lines: list[str] = []
    process = guard.start(
        [*DVC, "--wait-for-lock", "repro", "-s", stage],
        cwd=folder,
        env=stage_environment(os.environ, side_by_side),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with _lock:
        _running.add(process)
    try:
        assert process.stdout
        for line in process.stdout:
            if line.strip() and not line.startswith(CHATTER):
                lines.append(line.rstrip())
                logger.info(line.rstrip())
        status = process.wait()
    finally:
        guard.end(process)
        with _lock:
            _running.discard(process)
    if status != 0:
        raise failure(stage, status, lines)
    return outcome(stage, lines)


@contextlib.contextmanager
def none_left_behind() -> Iterator[None]:
    """End every running stage when the block is left by an exception, a cancellation included.

    Without it the flow would wait for threads that wait for their stages.
    """
    try:
        yield
    except BaseException:
        with _lock:
            running = list(_running)
        for process in running:
            guard.end(process)
        raise


def stage_environment(environment: Mapping[str, str], side_by_side: int) -> dict[str, str]:
    """The stage's environment: this interpreter's commands first, and its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    # No Prefect settings: a stage knows of no orchestra, and the dvc in it is this one.
    inherited = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    return {"OMP_NUM_THREADS": str(threads), **inherited, **QUIET, "PATH": path}


def failure(stage: str, status: int, lines: list[str]) -> StageFailed:
    """The exception for a stage that ended with `status`, told in its own last words."""
    if any("is busy" in line or "Unable to acquire lock" in line for line in lines):
        return StageBusy(f"{stage}: the workspace is busy. Another run holds it")
    started = next((i for i, line in enumerate(lines) if line.startswith("Running stage")), -1)
    said = [line for line in lines[started + 1 :] if not line.startswith("ERROR: failed to reproduce")]
    faults = [line for line in lines if line.startswith("ERROR")]
    last = said[-1] if started >= 0 and said else (faults or [""])[-1]
    return StageFailed(f"{stage}: {last.removeprefix('ERROR: ') or f'ended with status {status}'}")


def outcome(stage: str, lines: list[str]) -> Outcome:
    """What `dvc repro` says it did with a stage that ended well."""
    about = [line for line in lines if re.search(rf"[Ss]tage '{re.escape(stage)}'", line)]
    if any(line.startswith("Running stage") for line in about):
        return "ran"
    return "restored" if any("is cached" in line for line in about) else "unchanged"
