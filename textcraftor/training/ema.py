"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weights after each step, with a smaller decay in the first steps.

    decay: 0 keeps no average, and every method does nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Update after step number `steps_done` (from 1)."""
        decay = min(self.decay, steps_done / (steps_done + 9))
        for name, average in self.weights.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the average."""
        for name, average in self.weights.items():
            self.parameters[name].copy_(average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights while the block runs, then restore its own."""
        saved = {name: self.parameters[name].detach().clone() for name in self.weights}
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self.parameters[name].copy_(value)
