"""SIGKILL at random moments and during checkpoint writes: the artifact has the bytes of an unbroken run."""

from pathlib import Path

import pytest

from benchmarks.kills import killed, survive
from tests.training.test_stages import CPU, run
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config

__all__ = ["run"]  # the fixture


def test_a_run_killed_repeatedly_ends_in_the_same_bytes(run: Config, tmp_path: Path) -> None:
    train = {"steps": 8, "checkpoint_every": 1, "grid_every": 4}
    run = run.model_copy(update={"train": run.train.model_copy(update=train)})
    prepare(run, tmp_path, CPU)
    found = survive(run, "redder", tmp_path, kills=2)
    assert found["same"] and found["kills"] == {"at a random moment": 1, "amid a checkpoint": 1} and not found["left_behind"]


def test_a_run_that_fails_by_itself_is_not_counted_as_killed() -> None:
    assert not killed(abs, (1,), lambda: False)
    with pytest.raises(RuntimeError, match="failed on its own"):
        killed(divmod, (1, 0), lambda: False)
