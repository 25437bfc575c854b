"""Which stages run at the same time, on GPUs that are only named: the stages are toys."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.full import tune_and_evaluate
from tasks.gpus import GpuPool, visible_gpus
from tasks.stages import StageFailed, repro, stop_stages_on_error
from tasks.workspace import Workspace
from tests.flows.project import make_project, stages_run

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A project whose stages before training are done."""
    return make_prepared(tmp_path)


def make_prepared(folder: Path, **sections: object) -> Path:
    project = make_project(folder / "project", **sections)
    (project / "data/latents").mkdir(parents=True)
    (project / "data/latents/train.bin").write_bytes(b"latents")
    return project


def in_flow(call: Callable[[], Any]) -> Any:
    """Whatever `call` returns inside a flow, where tasks retry."""

    @flow
    def story() -> Any:
        return call()

    return story()


def peak(events: list[str]) -> int:
    """The greatest number of stages that ran at the same time."""
    running = highest = 0
    for event in events:
        running += 1 if event == "begin" else -1
        highest = max(highest, running)
    return highest


@pytest.mark.parametrize(("gpus", "mixes"), [(["0"], ["balanced"]), (["0", "GPU-b"], ["balanced", "aesthetic"])])
def test_a_gpu_runs_one_stage_at_a_time(tmp_path: Path, gpus: list[str], mixes: list[str]) -> None:
    prepared = make_prepared(tmp_path, mixes=mixes)
    (prepared / "devices.log").touch()

    in_flow(lambda: tune_and_evaluate(Workspace(prepared), GpuPool(gpus)))
    events = [line.split(" ") for line in (prepared / "devices.log").read_text().splitlines()]
    assert len(events) == 2 * len(stages_run(prepared)) == 2 + 4 * len(mixes)
    assert {gpu for _, gpu in events} == set(gpus)
    assert peak([event for event, _ in events]) <= len(gpus)
    for gpu in gpus:
        assert peak([event for event, used in events if used == gpu]) == 1


def test_a_preempted_stage_is_retried(prepared: Path) -> None:
    (prepared / "preempt").touch()
    assert in_flow(lambda: repro.with_options(retry_delay_seconds=0)("train@balanced", prepared)) == "ran"
    assert stages_run(prepared) == ["train balanced", "train balanced"]


def test_no_stage_starts_after_the_flow_was_stopped(prepared: Path) -> None:
    def stopped() -> None:
        with pytest.raises(KeyboardInterrupt), stop_stages_on_error():
            raise KeyboardInterrupt
        with pytest.raises(StageFailed, match="not started"):
            repro("train@balanced", prepared)

    in_flow(stopped)
    assert stages_run(prepared) == []
    assert in_flow(lambda: repro("train@balanced", prepared)) == "ran"  # another flow of the same process


@pytest.mark.parametrize(
    ("listed", "gpus"), [("", []), ("-1", []), ("0", ["0"]), ("2, GPU-7f", ["2", "GPU-7f"]), ("1,-1,0", ["1"])]
)
def test_gpus_are_those_that_cuda_may_see(listed: str, gpus: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == gpus


def test_torch_counts_the_gpus_where_none_are_listed() -> None:
    import torch

    unset = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    assert len(visible_gpus(unset)) == torch.cuda.device_count()
