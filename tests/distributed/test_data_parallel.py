"""Two processes are one with twice the micro batch."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Redness
from tests.processes import in_processes
from tests.training.test_trainer import SETTINGS, TOLERANCE, Rivalry, gradient, new_trainer, watched, weights
from textcraftor.distributed import data_parallel
from textcraftor.errors import TrainingError
from textcraftor.models.base import Base
from textcraftor.training.checkpoint import Progress
from textcraftor.training.preemption import StopRequest
from textcraftor.training.trainer import SUCCEEDED

CPU = torch.device("cpu")


@pytest.mark.parametrize("reward", [Redness, Rivalry])
def test_the_gradient_of_two_processes_is_that_of_twice_the_batch(
    exact_base: Base, tmp_path: Path, reward: type[Redness]
) -> None:
    twice = SETTINGS.model_copy(update={"batch_size": 8, "accumulation": 2, "steps": 1})
    expected = gradient(new_trainer(exact_base, twice, reward()))

    def work() -> None:
        trainer = new_trainer(exact_base, SETTINGS.model_copy(update={"batch_size": 4, "accumulation": 2}), reward())
        record, status, _ = trainer._accumulate_gradients(Progress(), StopRequest())
        assert status == SUCCEEDED and record
        data_parallel.all_reduce_mean([p.grad for p in trainer.module.parameters() if p.grad is not None])
        mean = data_parallel.mean_over_ranks({"rank": float(data_parallel.rank())}, CPU)
        assert mean == {"rank": 0.5} and data_parallel.max_over_ranks(data_parallel.rank(), CPU) == 1
        ours = torch.cat([p.grad.flatten() for p in trainer.module.parameters() if p.grad is not None])
        torch.save(ours, tmp_path / f"{data_parallel.rank()}.pt")

    in_processes(2, work)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float64 and (first - expected).norm() <= TOLERANCE * expected.norm()


def test_a_run_of_two_processes_ends_where_one_with_twice_the_batch_does(base: Base, tmp_path: Path) -> None:
    alone = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 8}))
    history = alone.fit(tmp_path / "alone", "key", watched(alone))

    def work() -> None:
        trainer = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 4}))
        ours = trainer.fit(tmp_path / "together", "key", watched(trainer))
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in history], rel=1e-4)
        torch.save(weights(trainer), tmp_path / f"{data_parallel.rank()}.pt")

    in_processes(2, work)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in weights(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-3, rtol=0)  # AdamW magnifies rounding where gradients are ~0
    assert (tmp_path / "together/checkpoint.safetensors").is_file()


def test_what_breaks_in_one_process_stops_both(base: Base, tmp_path: Path) -> None:
    def work() -> None:
        reward = Redness()
        if data_parallel.rank() == 1:
            reward.scale.fill_(float("nan"))
        trainer = new_trainer(base, SETTINGS, reward)
        with pytest.raises(TrainingError, match="not finite" if data_parallel.rank() else "Another process"):
            trainer.fit(tmp_path, "key", watched(trainer))

    in_processes(2, work)
