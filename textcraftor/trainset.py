"""The train prompts with what `prepare` computed for them, as an endless stream of batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro batch of b prompts, of the B that an optimiser step takes over all micro batches and processes."""

    prompts: list[str]  # b
    latents: Tensor  # (b, C', h, w), at the training switch
    text_features: Mapping[str, Tensor]  # reward -> (B, D): a reward may hold an image against the others' prompts
    first: int = 0  # row of the B that the first of the b is

    @property
    def rows(self) -> slice:
        """Which of the B the b are."""
        return slice(self.first, self.first + len(self.prompts))

    def part(self, start: int, stop: int) -> "Batch":
        """Samples `start` .. `stop` of this micro batch."""
        return Batch(self.prompts[start:stop], self.latents[start:stop], self.text_features, self.first + start)


@dataclass(frozen=True)
class TrainSet:
    """Row i of each belongs to prompt i."""

    prompts: list[str]
    latents: Tensor  # (N, C', h, w), at the training switch
    text_features: Mapping[str, Tensor]  # reward -> (N, D)
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def batch(self, step: range, first: int, size: int, seed: int, device: torch.device) -> Batch:
        """The micro batch `first` .. `first + size` of an optimiser step, which takes positions `step` of an endless stream.

        Each epoch has an order of its own, a function of the seed: a resumed run goes on where it was.
        """
        places = [int(self._order(seed, place // len(self.prompts))[place % len(self.prompts)]) for place in step]
        features = {name: values[places].to(device) for name, values in self.text_features.items()}
        own = places[first : first + size]
        return Batch([self.prompts[row] for row in own], self.latents[own].to(device), features, first)

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's permutation; two are kept, since a batch may straddle two epochs (10 M rows: 80 MB each)."""
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self.prompts))
        return self._orders[seed, epoch]
