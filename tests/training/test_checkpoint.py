"""A checkpoint restores a run exactly; a failed write leaves the previous one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from textcraftor.errors import TrainingError
from textcraftor.training import checkpoint as module_under_test
from textcraftor.training.checkpoint import Checkpoint, Progress, differences, read_facts
from textcraftor.training.optimizer import allocate_moments

FACTS = {"train": {"learning_rate": 1e-5}}


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return module, optimizer


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    state = checkpoint.read()
    assert state is not None
    state.load_into(module, optimizer)
    return state.progress


def test_weights_optimizer_rng_and_progress_are_restored(tmp_path: Path) -> None:
    module, optimizer = trained()
    checkpoint = Checkpoint(tmp_path / "c.safetensors", FACTS)
    torch.manual_seed(7)
    progress = Progress(3, [{"step": 3, "loss": 0.5}], 2, [{"from_step": 0, "world_size": 1}])
    checkpoint.save(progress, module, optimizer)
    expected_random = torch.rand(4)
    fresh, fresh_optimizer = trained(steps=0)
    assert restore(checkpoint, fresh, fresh_optimizer) == progress
    assert torch.equal(torch.rand(4), expected_random)
    for one, other in ((module, optimizer), (fresh, fresh_optimizer)):
        other.zero_grad()
        one(torch.ones(2, 3)).sum().backward()
        other.step()
    for one, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_a_file_there_is_no_state(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "c.safetensors", FACTS).read() is None


@pytest.mark.parametrize("damage", ["truncated", "without metadata", "not safetensors"])
def test_an_unreadable_file_is_an_error_and_is_kept(tmp_path: Path, damage: str) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", FACTS)
    if damage == "without metadata":
        save_file({"weights.0.bias": torch.zeros(1)}, checkpoint.path)
    elif damage == "not safetensors":
        checkpoint.path.write_bytes(b"\0" * 64)
    else:
        checkpoint.save(Progress(3), *trained())
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-9])
    before = checkpoint.path.read_bytes()
    with pytest.raises(TrainingError, match=r"c\.safetensors exists but cannot be read .*or delete it to start at step 0"):
        checkpoint.read()
    assert checkpoint.path.read_bytes() == before


def test_a_checkpoint_says_what_made_it(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c.safetensors", FACTS).save(Progress(3), *trained())
    assert read_facts(tmp_path / "c.safetensors") == (3, FACTS)


def test_differences_name_settings_by_their_path() -> None:
    old = {"train": {"learning_rate": 1e-5, "seed": 0}, "mix": {"clip": 1.0}, "inputs": {"prompts": "a" * 64}}
    new = {"train": {"learning_rate": 1e-6, "seed": 0}, "mix": {"pickscore": 1.0}, "inputs": {"prompts": "b" * 64}}
    assert differences(old, new) == [
        "train.learning_rate: 1e-05 -> 1e-06",
        "mix.clip: 1.0 -> None",
        "inputs.prompts: aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "mix.pickscore: None -> 1.0",
    ]


def test_moments_allocated_beforehand_are_those_of_the_first_step(tmp_path: Path) -> None:
    states = []
    for beforehand in (False, True):
        torch.manual_seed(0)
        module = nn.ModuleDict({"used": nn.Linear(3, 4), "unused": nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if beforehand:
            allocate_moments(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            module["used"](torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        path = tmp_path / f"{beforehand}.safetensors"
        torch.manual_seed(1)
        Checkpoint(path, FACTS).save(Progress(2), module, optimizer)
        states.append(load_file(path))
    assert states[0].keys() == states[1].keys() and not any("unused" in name for name in states[0] if "optimizer" in name)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", FACTS)
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
