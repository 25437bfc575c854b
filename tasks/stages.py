"""DVC stages as Prefect tasks: DVC decides what is computed, Prefect only when.

A stage runs as `dvc repro -s STAGE` in a process group of its own that cannot outlive the flow.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from tasks import guard, stage_times
from tasks.environment import grace_seconds, stage_environment
from tasks.gpus import GpuPool
from tasks.locks import drop_dead_locks
from textcraftor.errors import Preempted, UserError

Outcome = Literal["ran", "restored", "unchanged"]

DVC = [sys.executable, "-m", "dvc"]
# What DVC says about itself and about git, without its indentation.
CHATTER = (
    *("Updating lock file", "Generating lock file", "Use `dvc push`", "> "),
    *("To track the changes with git", "git add ", "To enable auto staging", "dvc config core.autostage"),
)

# What a command ends with after SIGTERM: its checkpoint written, or with nothing to save. DVC prints the negative number
# of a signal, a shell and the guard add 128 to it.
PREEMPTED = (Preempted.exit_status, -signal.SIGTERM, 128 + signal.SIGTERM)

_lock = threading.Lock()
_running: set["subprocess.Popen[str]"] = set()
_stopped: set[str] = set()  # ids of flow runs that were left by an exception: no further stage of theirs starts


class StageFailed(UserError):
    """A stage ended with an error; the message is the last line it printed."""


class StageBusy(StageFailed):
    """Another process holds the stage or the workspace: a retry helps."""


class StagePreempted(StageFailed):
    """The stage was sent SIGTERM, and the flow was not: a retry resumes from the checkpoint."""


def is_retryable(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a retry helps: another process held the workspace, or the stage was preempted."""
    return isinstance(state.result(raise_on_failure=False), StageBusy | StagePreempted)


@task(
    task_run_name="{stage}",
    retries=10,
    retry_delay_seconds=6,
    retry_condition_fn=is_retryable,
    cache_policy=NO_CACHE,
)
def repro(stage: str, folder: Path, concurrency: int = 1, gpus: GpuPool | None = None) -> Outcome:
    """Bring one stage of the workspace at `folder` up to date, its output streamed into the log.

    concurrency: how many stages run at the same time; the cores are divided among them.
    gpus: the stage waits for one of them, and sees no other.
    Returns what DVC did: "ran" it, "restored" its outputs from the cache, or found it "unchanged".
    Raises StageFailed with the stage's last line; StageBusy and StagePreempted are retried.
    """
    logger = get_run_logger()
    lines: list[str] = []
    with (gpus or GpuPool()).lend() as gpu:
        drop_dead_locks(folder)
        started = time.time()
        process = _start(stage, folder, stage_environment(os.environ, concurrency, gpu))
        try:
            assert process.stdout
            for line in process.stdout:
                if line.strip() and not line.lstrip().startswith(CHATTER):
                    lines.append(line.rstrip())
                    logger.info(line.rstrip())
            status = process.wait()
        finally:
            guard.end(process)
            with _lock:
                _running.discard(process)
    if status != 0:
        raise StageFailed(f"{stage}: stopped with the flow") if _is_stopped() else stage_error(stage, status, lines)
    outcome = parse_outcome(stage, lines)
    if outcome == "ran":
        stage_times.write(folder, stage, started, time.time())
    return outcome


def _start(stage: str, folder: Path, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    with _lock:
        if _is_stopped():
            raise StageFailed(f"{stage}: not started, because the flow stopped")
        process = guard.start(
            [*DVC, "--wait-for-lock", "repro", "-s", stage],
            grace=grace_seconds(os.environ),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        _running.add(process)
    return process


def _is_stopped() -> bool:
    return flow_run.id in _stopped


@contextlib.contextmanager
def stop_stages_on_error() -> Iterator[None]:
    """End every running stage, and start no other, when the block is left by an exception or a cancellation.

    Without it the flow would wait for threads that wait for their stages.
    """
    try:
        yield
    except BaseException:
        with _lock:
            if flow_run.id:
                _stopped.add(flow_run.id)
            running = list(_running)
        guard.end(*running)
        raise


def stage_error(stage: str, status: int, lines: list[str]) -> StageFailed:
    """The exception for a stage that ended with `status`: the last line that it printed, or what DVC says about itself."""
    for number, line in enumerate(lines):
        if "is busy" in line or "Unable to acquire lock" in line:  # who holds it, and what to do, follows
            said = " ".join(" ".join(lines[number:]).split())
            return StageBusy(f"{stage}: {said.removeprefix('ERROR: ').removeprefix(f'failed to reproduce {stage!r}: ')}")
        if found := re.match(r"'(.*)' is invalid \(possible merge conflicts\)", line):
            return StageFailed(f"{stage}: {found[1]} is no valid YAML. If git left conflict markers in it, choose one side")
    started = next((i for i, line in enumerate(lines) if line.startswith("Running stage")), -1)
    printed = [line for line in lines[started + 1 :] if not line.startswith("ERROR: failed to reproduce")]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = printed[-1] if started >= 0 and printed else (errors or [""])[-1]
    ended = [int(found[1]) for line in errors if (found := re.search(r"exited with (-?\d+)$", line))]
    kind = StagePreempted if (ended or [status])[-1] in PREEMPTED else StageFailed
    return kind(f"{stage}: {last.removeprefix('ERROR: ') or f'ended with status {status}'}")


def parse_outcome(stage: str, lines: list[str]) -> Outcome:
    """What `dvc repro` says it did with a stage that ended well."""
    about = [line for line in lines if re.search(rf"[Ss]tage '{re.escape(stage)}'", line)]
    if any(line.startswith("Running stage") for line in about):
        return "ran"
    return "restored" if any("is cached" in line for line in about) else "unchanged"
