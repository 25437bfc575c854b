"""Data parallel training: two processes equal one with twice the micro batch; failures stop both."""

from pathlib import Path

import pytest
import torch

from tests.fixtures import Redness
from tests.processes import in_processes
from tests.training.test_stages import contents
from tests.training.test_trainer import FACTS, SETTINGS, TOLERANCE, ContrastiveRedness, gradient, new_trainer, preview, weights
from textcraftor.distributed import data_parallel
from textcraftor.errors import TrainingError
from textcraftor.models.base import Base
from textcraftor.training.checkpoint import Progress
from textcraftor.training.preemption import StopRequest
from textcraftor.training.trainer import SUCCEEDED

CPU = torch.device("cpu")


@pytest.mark.parametrize("reward", [Redness, ContrastiveRedness])
def test_two_processes_have_the_gradient_of_twice_the_micro_batch(
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


def test_two_processes_train_the_weights_of_twice_the_micro_batch(base: Base, tmp_path: Path) -> None:
    alone = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 8}))
    history = alone.fit(tmp_path / "alone", FACTS, preview(alone)).history

    def work() -> None:
        trainer = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 4}))
        ours = trainer.fit(tmp_path / "together", FACTS, preview(trainer)).history
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in history], rel=1e-4)
        torch.save(weights(trainer), tmp_path / f"{data_parallel.rank()}.pt")

    in_processes(2, work)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in weights(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-3, rtol=0)  # AdamW magnifies rounding where gradients are ~0
    assert (tmp_path / "together/checkpoint.safetensors").is_file()


def test_a_nonfinite_reward_on_one_rank_stops_both(base: Base, tmp_path: Path) -> None:
    def work() -> None:
        reward = Redness()
        if data_parallel.rank() == 1:
            reward.scale.fill_(float("nan"))
        trainer = new_trainer(base, SETTINGS, reward)
        with pytest.raises(TrainingError, match="not finite" if data_parallel.rank() else "Another process"):
            trainer.fit(tmp_path, FACTS, preview(trainer))

    in_processes(2, work)


def save_checkpoint(base: Base, folder: Path, steps: int) -> None:
    """Write the checkpoint of a run of `steps` steps."""
    trainer = new_trainer(base, SETTINGS.model_copy(update={"steps": steps}))
    trainer.fit(folder, FACTS, preview(trainer))


@pytest.mark.parametrize("other", ["none", "another step", "other bytes", "unreadable"])
def test_ranks_that_find_different_checkpoints_stop(base: Base, tmp_path: Path, other: str) -> None:
    save_checkpoint(base, tmp_path / "0", 2)
    if other == "another step":
        save_checkpoint(base, tmp_path / "1", 1)
    elif other in ("other bytes", "unreadable"):
        (tmp_path / "1").mkdir()
        data = bytearray((tmp_path / "0/checkpoint.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "1/checkpoint.safetensors").write_bytes(data if other == "other bytes" else data[:-9])
    before = contents(tmp_path)
    message = {
        "none": r"different checkpoints: rank 0 step 2 .*, rank 1 none",
        "another step": r"different checkpoints: rank 0 step 2 .*, rank 1 step 1",
        "other bytes": r"different checkpoints: rank 0 step 2 .*, rank 1 step 2",
        "unreadable": r"Rank 1: .*exists but cannot be read",
    }[other]

    def work() -> None:
        trainer = new_trainer(base)
        with pytest.raises(TrainingError, match=message):
            trainer.fit(tmp_path / str(data_parallel.rank()), FACTS, preview(trainer))

    in_processes(2, work)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_cannot_be_written_stops_every_rank(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("textcraftor.training.checkpoint.save_file", disk_full)

    def work() -> None:
        trainer = new_trainer(base)
        with pytest.raises(TrainingError, match=r"step 2 cannot be written.*No space"):
            trainer.fit(tmp_path, FACTS, preview(trainer))

    in_processes(2, work)


def test_no_memory_for_the_optimizer_on_one_rank_stops_both_with_the_last_checkpoint(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 8}))
    unbroken.fit(tmp_path / "unbroken", FACTS, preview(unbroken))
    step = torch.optim.AdamW.step

    def work() -> None:
        calls = list[int]()

        def fails_in_the_third(self: torch.optim.AdamW, *arguments: object) -> object:
            calls.append(1)
            if len(calls) == 3 and data_parallel.rank() == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return step(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", fails_in_the_third)
            trainer = new_trainer(base)
            with pytest.raises(TrainingError, match=r"Step 2: no memory for the optimiser's update"):
                trainer.fit(tmp_path / "broken", FACTS, preview(trainer))
        resumed = new_trainer(base)
        resumed.fit(tmp_path / "broken", FACTS, preview(resumed))
        if data_parallel.rank() == 0:
            torch.save(weights(resumed), tmp_path / "resumed.pt")

    in_processes(2, work)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    for name, value in weights(unbroken).items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=0)
