"""A training checkpoint: one safetensors file, written atomically, from which a run resumes to the same bytes.

It holds the trained weights, AdamW's moments, the moving average and torch's RNG state. Its metadata holds the step
(also the data position: the order of prompts is a function of seed and step), the history, how each step was executed,
and the facts that determine the result. Only a run with the same facts resumes it. It lies outside the stage's outputs,
which DVC deletes before a stage runs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from textcraftor.artifact import clear_aside, digest, written_aside
from textcraftor.distributed import data_parallel
from textcraftor.distributed.fsdp import gather_on_rank0, shard_like
from textcraftor.errors import TrainingError

FILE_NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a run has come."""

    done: int = 0  # optimiser steps
    history: list[dict[str, Any]] = field(default_factory=list)
    split: int = 1  # the micro batch is divided by this, and accumulation multiplied, after a lack of memory
    execution: list[dict[str, Any]] = field(default_factory=list)  # how the steps were executed, see `record_execution`

    def record_execution(self, facts: Mapping[str, Any]) -> list[str]:
        """Note how the steps from here on are executed; returns what differs from the steps before.

        A new entry, with the step it begins at, is added only when something differs: a run that was interrupted and
        resumed alike has the same record as an unbroken one.
        """
        changes: list[str] = []
        if self.execution:
            last = {name: value for name, value in self.execution[-1].items() if name != "from_step"}
            changes = differences(last, facts)
            if not changes:
                return []
            if self.execution[-1]["from_step"] == self.done:
                self.execution.pop()
        self.execution.append({"from_step": self.done, **facts})
        return changes


@dataclass(frozen=True)
class SavedState:
    """The contents of a checkpoint file, on the CPU."""

    tensors: Mapping[str, Tensor]
    progress: Progress

    def load_into(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
    ) -> None:
        """Restore weights, optimiser state, moving average (by parameter name) and torch's RNG state."""
        with torch.no_grad():
            for name, parameter in _trained_parameters(module):
                parameter.copy_(shard_like(self.tensors[f"weights.{name}"], parameter))
            for name, value in (average or {}).items():
                value.copy_(shard_like(self.tensors[f"average.{name}"], value))
        slots = (self._optimizer_slots(name, parameter) for name, parameter in _trained_parameters(module))
        state = {index: found for index, found in enumerate(slots) if found}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(self.tensors["rng"])

    def _optimizer_slots(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter: moments are sharded as the parameter is, the step count is not."""
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {
            slot: shard_like(value, parameter) if value.shape == parameter.shape else value for slot, value in found.items()
        }


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint file of one run.

    facts: what determines the run's result. A checkpoint with other facts belongs to another run.
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """sha256 of the facts."""
        return facts_key(self.facts)

    def save(
        self,
        progress: Progress,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the state after `progress.done` steps; the previous checkpoint is replaced once this one is complete.

        Rank 0 writes. Collective: every rank must call it, because sharded tensors are gathered.

        average: the moving average of the trained weights, by parameter name.
        Raises TrainingError on every rank when the file cannot be written.
        """
        names = [name for name, _ in _trained_parameters(module)]
        tensors: dict[str, Tensor] = {f"weights.{name}": parameter for name, parameter in _trained_parameters(module)}
        tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
        for index, state in optimizer.state_dict()["state"].items():
            if state["step"] > 0:  # without a gradient so far, the moments are zeros
                tensors |= {f"optimizer.{names[index]}.{slot}": value for slot, value in state.items()}
        tensors = gather_on_rank0(tensors)
        failure = self._write(tensors, progress) if data_parallel.rank() == 0 else None
        if failure := data_parallel.all_gather(failure)[0]:
            raise TrainingError(failure)

    def _write(self, tensors: dict[str, Tensor], progress: Progress) -> str | None:
        """Returns the error message if the file cannot be written."""
        tensors["rng"] = torch.get_rng_state()
        values = {"step": progress.done, "split": progress.split, "history": progress.history}
        values |= {"execution": progress.execution, "facts": self.facts}
        metadata = {"key": self.key, **{name: json.dumps(value) for name, value in values.items()}}
        try:
            with written_aside(self.path) as aside:
                save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata=metadata)
        except (OSError, SafetensorError) as error:
            kept = "the checkpoint before it is whole" if self.path.exists() else "there is none before it"
            return (
                f"The checkpoint after step {progress.done} cannot be written to {self.path} ({error}); {kept}. "
                "Make room and run the same command again: it resumes"
            )
        return None

    def read(self) -> SavedState | None:
        """The saved state, None if there is no checkpoint. Collective: every rank gets the same state, or all raise.

        Leftovers of a killed write are removed; a checkpoint never is.
        Raises TrainingError if the file exists but cannot be read, belongs to another run, or the ranks found
        different files or have different facts.
        """
        if data_parallel.rank() == 0:
            clear_aside(self.path)
        state, problem = self._read()
        step = state.progress.done if state else None
        file_digest = digest(self.path) if state and data_parallel.world_size() > 1 else None
        ranks = data_parallel.all_gather({"key": self.key, "problem": problem, "step": step, "digest": file_digest})
        for rank, found in enumerate(ranks):
            if found["problem"]:
                raise TrainingError(f"Rank {rank}: {found['problem']}" if len(ranks) > 1 else found["problem"])
        if len({found["key"] for found in ranks}) > 1:
            raise TrainingError(
                "The ranks have different settings, prompts or models. Start every rank on the same workspace and params.yaml"
            )
        if len({found["digest"] for found in ranks}) > 1:
            listed = ", ".join(f"rank {rank} {_describe_found(found)}" for rank, found in enumerate(ranks))
            raise TrainingError(
                f"The ranks found different checkpoints: {listed}. All must resume from the same file: put "
                f"{self.path.parent} on a disk that every machine shares, or copy rank 0's there"
            )
        return state

    def _read(self) -> tuple[SavedState | None, str | None]:
        """(state, None), (None, None) without a checkpoint, or (None, what is wrong with it)."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = {name: json.loads(metadata[name]) for name in ("facts", "step", "history", "split", "execution")}
        except FileNotFoundError:
            return None, None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            return None, (
                f"{self.path} exists but cannot be read ({type(error).__name__}: {error}). It is kept as it is. Put a good "
                "copy in its place and run the same command again, or delete it to start at step 0"
            )
        if facts_key(found["facts"]) != self.key:
            changes = "; ".join(differences(found["facts"], self.facts))
            return None, (
                f"{self.path} holds step {found['step']} of another run ({changes}). It is kept as it is. Move it away, or "
                "set these back to resume it"
            )
        return SavedState(tensors, Progress(found["step"], found["history"], found["split"], found["execution"])), None


def read_facts(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, facts) of a checkpoint file, from its metadata alone. Raises OSError, SafetensorError, KeyError, ValueError."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return int(json.loads(metadata["step"])), json.loads(metadata["facts"])


def facts_key(facts: Mapping[str, Any]) -> str:
    """sha256 of facts, whatever the order of their names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One "name: old -> new" for each value that differs; names of nested mappings are joined by dots."""
    before, after = _flat(old), _flat(new)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}" for name in changed]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = dict[str, Any]()
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _short(value: Any) -> str:
    """A value for a message; digests are cut to 12 digits."""
    return " ".join(word[:12] if len(word) == 64 else word for word in str(value).split(" "))


def _describe_found(found: Mapping[str, Any]) -> str:
    return "none" if found["step"] is None else f"step {found['step']} (sha256 {found['digest'][:12]})"


def _trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
