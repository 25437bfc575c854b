"""The resumable training loop of every model in the recipe: AdamW or Muon, linear decay, bfloat16, EMA."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from textcraftor.errors import TrainingError
from textcraftor.tiny.recipe.files import save_tensors


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length and learning rate of one training run.

    steps: optimiser steps.  batch: samples per step.  peak_lr: learning rate after a warm-up of a tenth of the steps, 300 at
    most.  muon_lr: that of the hidden matrices and convolutions, which Muon then trains; 0: AdamW trains them too.
    decay: final fraction of the steps in which the rate falls linearly to a hundredth.  ema: decay of the averaged weights,
    which are the result (0: the last weights).  save_every: steps between checkpoints.
    """

    steps: int
    batch: int
    peak_lr: float
    muon_lr: float = 0.0
    decay: float = 0.9
    ema: float = 0.0
    weight_decay: float = 0.01
    save_every: int = 100

    def factor(self, step: int) -> float:
        """The learning rate of a step as a fraction of `peak_lr`."""
        warm_up = min(1.0, (step + 1) / min(300, self.steps / 10 + 1))
        return warm_up * max(0.01, min(1.0, (self.steps - step) / (self.decay * self.steps)))


def generator(seed: int, label: str, step: int = 0) -> np.random.Generator:
    """The random generator of one step of one run; one for each step, so that a resumed run equals an uninterrupted one.

    `label` is part of the seed: renaming a run changes its result.
    """
    return np.random.default_rng([seed, zlib.crc32(label.encode()), step])


def _average(averaged: list[Tensor], model: nn.Module, decay: float, step: int) -> None:
    # A smaller decay at first, so that the average forgets the random initialisation.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averaged, [parameter.detach() for parameter in model.parameters()], 1 - decay)


class MatrixMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for parameters of any shape, each as a matrix (out, everything else).

    Torch's takes matrices only; a convolution becomes one without a copy.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.originals = parameters
        matrices = [nn.Parameter(parameter.detach().flatten(1)) for parameter in parameters]
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.matrices = matrices

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients of the original parameters."""
        for matrix, original in zip(self.matrices, self.originals, strict=True):
            matrix.grad = None if original.grad is None else original.grad.flatten(1)
        super().step(closure)


def _optimisers(model: nn.Module, schedule: Schedule, by_adamw: nn.Module | None) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the hidden matrices outside of the part `by_adamw` if the schedule says so."""
    ids = {id(parameter) for parameter in by_adamw.parameters()} if by_adamw else set()
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_hidden = parameter.ndim > 1 and not any(word in name for word in ("conv_in", "conv_out", "time_embedding"))
            (matrices if schedule.muon_lr and is_hidden and id(parameter) not in ids else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=schedule.peak_lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98))
    return [adamw, *([MatrixMuon(matrices, schedule.muon_lr, schedule.weight_decay)] if matrices else [])]


def fit(
    label: str,
    model: nn.Module,
    loss_at: Callable[[np.random.Generator], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
    by_adamw: nn.Module | None = None,
    snapshots: Mapping[int, Path] | None = None,
) -> None:
    """Train `model` in place; afterwards it is in eval mode and holds the averaged weights.

    loss_at: draws a batch with the given generator and returns its loss.  checkpoint: file to resume from if it exists,
    and to save progress to.  by_adamw: a part of the model that Muon leaves to AdamW.  snapshots: safetensors
    files of the averaged weights, by the number of steps after which each is written.  Raises TrainingError when the
    gradient is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimisers = _optimisers(model, schedule, by_adamw)
    stateful: list[Any] = [
        *optimisers,
        *(torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.factor) for optimiser in optimisers),
    ]
    averaged = [parameter.detach().clone() for parameter in model.parameters()]
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, state in zip(stateful, saved["optimisers"], strict=True):
            part.load_state_dict(state)
        averaged, first = saved["averaged"], saved["step"]
    model.train()
    total = torch.zeros((), device=device)
    for step in track(range(first, schedule.steps), description=label):
        torch.manual_seed(int(generator(seed, label + " torch", step).integers(2**62)))
        # On CPUs the backward pass of flash attention in bfloat16 takes longer than the rest of a tower.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_at(generator(seed, label, step))
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise TrainingError(f"{label}: the gradient is {norm.item()} at step {step}. Lower its peak_lr and start again.")
        for part in stateful:
            part.step()
        model.zero_grad(set_to_none=True)
        _average(averaged, model, schedule.ema, step)
        if path := (snapshots or {}).get(step + 1):
            names = [name for name, _ in model.named_parameters()]
            save_tensors(dict(zip(names, averaged, strict=True)), path)
        total += loss.detach().float()
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            print(f"{label} {step + 1}/{schedule.steps} loss {total.item() / schedule.save_every:.4f}", flush=True)
            total.zero_()
            state = {
                "model": model.state_dict(),
                "optimisers": [part.state_dict() for part in stateful],
                "averaged": averaged,
                "step": step + 1,
            }
            temporary = checkpoint.with_suffix(".part")
            torch.save(state, temporary)
            temporary.replace(checkpoint)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), averaged, strict=True):
            parameter.copy_(mean)
    model.eval()
