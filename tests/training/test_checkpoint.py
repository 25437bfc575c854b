"""A checkpoint is whole or none."""

from pathlib import Path

import pytest
import torch
from torch import nn

from textcraftor.errors import TrainingError
from textcraftor.training import checkpoint as module_under_test
from textcraftor.training.checkpoint import Checkpoint, Progress


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return module, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    module, optimizer = trained()
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    torch.manual_seed(7)
    checkpoint.save(Progress(3, [{"step": 3, "loss": 0.5}], 2), module, optimizer)
    expected_random = torch.rand(4)
    fresh, fresh_optimizer = trained(steps=0)
    assert checkpoint.restore(fresh, fresh_optimizer) == Progress(3, [{"step": 3, "loss": 0.5}], 2)
    assert torch.equal(torch.rand(4), expected_random)
    for one, other in ((module, optimizer), (fresh, fresh_optimizer)):
        other.zero_grad()
        one(torch.ones(2, 3)).sum().backward()
        other.step()
    for one, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other key"])
def test_what_cannot_be_trusted_counts_as_none(tmp_path: Path, damage: str) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    checkpoint.save(Progress(3), *trained())
    if damage == "missing":
        checkpoint.path.unlink()
    elif damage == "truncated":
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-9])
    else:
        checkpoint = Checkpoint(checkpoint.path, "another key")
    module, optimizer = trained(steps=1)
    before = [parameter.clone() for parameter in module.parameters()]
    assert checkpoint.restore(module, optimizer) == Progress()
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    checkpoint.save(Progress(3), *trained())
    before = checkpoint.path.read_bytes()

    def disk_full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module_under_test, "save_file", disk_full)
    with pytest.raises(TrainingError, match=r"step 4 cannot be written.*No space.*the checkpoint before it is whole"):
        checkpoint.save(Progress(4), *trained())
    assert checkpoint.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
