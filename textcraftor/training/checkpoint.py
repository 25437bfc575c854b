"""A training checkpoint: one safetensors file, written atomically, that resumes to the same bytes.

It holds the trained weights, AdamW's moments, the moving average, torch's RNG state, the step (which is also the data
cursor: the order of prompts is a function of seed and step), the batch arithmetic and the history so far. Its key
names the run; a checkpoint of another run is never resumed. It lives outside the stage's outputs, which DVC deletes
before a stage runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from textcraftor.artifact import clear_aside, written_aside
from textcraftor.distributed import data_parallel
from textcraftor.distributed.fsdp import gather_on_rank0, shard_like
from textcraftor.errors import TrainingError


@dataclass
class Progress:
    """How far a run has come."""

    done: int = 0  # optimiser steps
    history: list[dict[str, Any]] = field(default_factory=list)
    split: int = 1  # times the micro batch was divided by this (and accumulation multiplied) for lack of memory


@dataclass(frozen=True)
class Checkpoint:
    """Where one run keeps its state, and the key of the run it belongs to."""

    path: Path
    key: str

    def save(
        self,
        progress: Progress,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the state after `progress.done` steps; the previous checkpoint survives until this one is whole.

        Of several processes the first writes; all must call it, because what is split over them is gathered.

        average: the moving average of the trained weights, by parameter name.
        Raises TrainingError when the disk is full or cannot be written.
        """
        names = [name for name, _ in _trained(module)]
        tensors: dict[str, Tensor] = {f"weights.{name}": parameter for name, parameter in _trained(module)}
        tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[index]}.{slot}": value for slot, value in state.items()}
        tensors = gather_on_rank0(tensors)
        if data_parallel.rank() > 0:
            return
        tensors["rng"] = torch.get_rng_state()
        facts = {"step": progress.done, "split": progress.split, "history": progress.history}
        metadata = {"key": self.key, **{name: json.dumps(value) for name, value in facts.items()}}
        try:
            with written_aside(self.path) as aside:
                save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata=metadata)
        except (OSError, SafetensorError) as error:
            kept = "the checkpoint before it is whole" if self.path.exists() else "there is none before it"
            raise TrainingError(
                f"The checkpoint after step {progress.done} cannot be written to {self.path} ({error}); {kept}. "
                "Make room and run the same command again: it resumes"
            ) from None

    def restore(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
    ) -> Progress:
        """Put module, optimiser, average and RNG back; returns how far the run had come, a fresh Progress without one.

        A checkpoint that cannot be read, or is of another run, counts as none. What a killed write left is removed.
        """
        clear_aside(self.path)
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return Progress()
        if metadata.get("key") != self.key:
            return Progress()
        with torch.no_grad():
            for name, parameter in _trained(module):
                parameter.copy_(shard_like(tensors[f"weights.{name}"], parameter))
            for name, value in (average or {}).items():
                value.copy_(shard_like(tensors[f"average.{name}"], value))
        state = {i: _slots(tensors, f"optimizer.{name}.", p) for i, (name, p) in enumerate(_trained(module))}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: slots for i, slots in state.items() if slots}})
        torch.set_rng_state(tensors["rng"])
        return Progress(*(json.loads(metadata[name]) for name in ("step", "history", "split")))


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _slots(tensors: dict[str, Tensor], prefix: str, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter: the moments are split as it is, the number of steps is everyone's."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {slot: shard_like(value, parameter) if value.shape == parameter.shape else value for slot, value in found.items()}
