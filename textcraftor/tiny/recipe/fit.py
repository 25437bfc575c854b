"""The resumable training loop of every model in the recipe: AdamW, one-cycle learning rate, bfloat16, EMA."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from textcraftor.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length and learning rate of one training run.

    steps: optimiser steps.  batch: samples per step.  peak_lr: maximum of the one-cycle schedule.  ema: decay of the
    averaged weights, which are the result (0: the last weights).  save_every: steps between checkpoints.
    """

    steps: int
    batch: int
    peak_lr: float
    ema: float = 0.0
    weight_decay: float = 0.01
    save_every: int = 100


def generator(seed: int, label: str, step: int = 0) -> np.random.Generator:
    """The random generator of one step of one run; one for each step, so that a resumed run equals an uninterrupted one.

    `label` is part of the seed: renaming a run changes its result.
    """
    return np.random.default_rng([seed, zlib.crc32(label.encode()), step])


def _average(averaged: list[Tensor], model: nn.Module, decay: float, step: int) -> None:
    # A smaller decay at first, so that the average forgets the random initialisation.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averaged, [parameter.detach() for parameter in model.parameters()], 1 - decay)


def fit(
    label: str,
    model: nn.Module,
    loss_at: Callable[[np.random.Generator], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
) -> None:
    """Train `model` in place; afterwards it is in eval mode and holds the averaged weights.

    loss_at: draws a batch with the given generator and returns its loss.  checkpoint: file to resume from if it exists,
    and to save progress to.  Raises TrainingError when the gradient is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(parameters, lr=schedule.peak_lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.peak_lr, schedule.steps + 1, pct_start=0.1)
    averaged = [parameter.detach().clone() for parameter in model.parameters()]
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        rate.load_state_dict(saved["rate"])
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
        optimiser.step()
        rate.step()
        optimiser.zero_grad(set_to_none=True)
        _average(averaged, model, schedule.ema, step)
        total += loss.detach().float()
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            print(f"{label} {step + 1}/{schedule.steps} loss {total.item() / schedule.save_every:.4f}", flush=True)
            total.zero_()
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "rate": rate.state_dict(),
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
