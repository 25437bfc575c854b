"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weights after each step, a shorter memory in the first steps.

    decay: 0 keeps none, and everything here does nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """After step number `steps_done` (from 1). Early on the average reaches back over fewer steps."""
        decay = min(self.decay, steps_done / (steps_done + 9))
        for name, average in self.weights.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the average into the module for good."""
        for name, average in self.weights.items():
            self.parameters[name].copy_(average)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module holds the average while the block runs, and its own weights again afterwards."""
        own = {name: self.parameters[name].detach().clone() for name in self.weights}
        self.take_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    self.parameters[name].copy_(value)
