"""The train prompts with what `prepare` computed for them, as an endless stream of batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from textcraftor.store import Rows


@dataclass(frozen=True)
class Batch:
    """Row i of each belongs to prompt i."""

    prompts: list[str]
    latents: Tensor  # (B, C', h, w), prefixes at the training switch: see `Sampler.prefix_shape`
    text_features: Mapping[str, Tensor]  # reward -> (B, D)


@dataclass(frozen=True)
class TrainSet:
    """Row i of each belongs to prompt i: tensors, stores, or what computes its rows when they are asked for."""

    prompts: Sequence[str] | pl.Series
    latents: Rows
    text_features: Mapping[str, Rows]
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def batch(self, position: int, size: int, seed: int, device: torch.device) -> Batch:
        """Rows `position` .. `position + size` of an endless stream, each epoch in an order of its own.

        A function of the seed and the position alone: a resumed run goes on where it was.
        Raises StoreError when a stored row is damaged.
        """
        places = range(position, position + size)
        rows = [int(self._order(seed, place // len(self.prompts))[place % len(self.prompts)]) for place in places]
        features = {name: values[rows].to(device) for name, values in self.text_features.items()}
        return Batch([self.prompts[row] for row in rows], self.latents[rows].to(device), features)

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's permutation; two are kept, since a batch may straddle two epochs (10 M rows: 80 MB each)."""
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self.prompts))
        return self._orders[seed, epoch]
