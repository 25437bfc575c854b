"""A training checkpoint: one safetensors file, written atomically, that resumes to the same bytes.

It holds the trained weights, AdamW's moments, torch's RNG state, the step (which is also the data cursor: the
order of prompts is a function of seed and step) and the history so far. Its key names the run; a checkpoint of
another run is never resumed. It lives outside the stage's outputs, which DVC deletes before a stage runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from textcraftor.artifact import written_aside


@dataclass(frozen=True)
class Checkpoint:
    """Where one run keeps its state, and the key of the run it belongs to."""

    path: Path
    key: str

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]]) -> None:
        """Write the state after `step` optimiser steps; the previous checkpoint survives until this one is whole."""
        tensors = {f"weights.{name}": parameter.detach() for name, parameter in module.named_parameters()}
        names = [name for name, _ in module.named_parameters()]
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[index]}.{slot}": value for slot, value in state.items()}
        tensors["rng"] = torch.get_rng_state()
        metadata = {"key": self.key, "step": str(step), "history": json.dumps(history)}
        with written_aside(self.path) as aside:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, aside, metadata=metadata)

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
        """Put module, optimiser and RNG back; returns (steps done, history), or (0, []) when there is none.

        A checkpoint that cannot be read, or is of another run, counts as none.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0, []
        if metadata.get("key") != self.key:
            return 0, []
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"weights.{name}"])
        names = [name for name, _ in module.named_parameters()]
        state = {index: _slots(tensors, f"optimizer.{name}.") for index, name in enumerate(names)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: slots for i, slots in state.items() if slots}})
        torch.set_rng_state(tensors["rng"])
        return int(metadata["step"]), json.loads(metadata["history"])


def _slots(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
