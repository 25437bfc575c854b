"""The weights that training ends with: their moving average, interpolated with the weights that it started from."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weights after each step, with a smaller decay in the first steps.

    What the module gets is start + share * (average - start) (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    decay: 0: the average is the last weights.  share: 1: the average alone. With a decay of 0 and a share of 1 nothing is
    kept, and every method does nothing.
    The module has its starting weights when this is made, also in a run that is resumed afterwards.
    """

    def __init__(self, module: nn.Module, decay: float, share: float = 1.0) -> None:
        self.decay, self.share = decay, share
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = self._copies() if decay or share < 1 else {}
        self._start = self._copies() if share < 1 else {}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Update after step number `steps_done` (from 1)."""
        decay = min(self.decay, steps_done / (steps_done + 9))
        for name, average in self.weights.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the interpolated average."""
        for name, average in self.weights.items():
            # A low-rank update is the product of two factors: one of them, scaled alone, scales the update.
            scaled = self.share < 1 and ".lora_A." not in name
            self.parameters[name].copy_(self._start[name].lerp(average, self.share) if scaled else average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module these weights while the block runs, then restore its own."""
        saved = {name: self.parameters[name].detach().clone() for name in self.weights}
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self.parameters[name].copy_(value)

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
