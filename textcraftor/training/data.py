"""The train prompts with what `prepare` computed for them, as an endless stream of batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from textcraftor.cache.store import Rows


@dataclass(frozen=True)
class Batch:
    """A micro batch of b samples, of the B that an optimiser step takes over all micro batches and processes."""

    prompts: list[str]  # b
    latents: Tensor  # (b, C', h, w), prefixes at the training switch: see `Sampler.prefix_shape`
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
    """Row i of each belongs to sample i: tensors, stores, or what computes its rows when they are asked for.

    images_per_prompt: so many samples in a row, each with noise of its own, are of one prompt and stay together.
    """

    prompts: Sequence[str] | pl.Series
    latents: Rows
    text_features: Mapping[str, Rows]
    images_per_prompt: int = 1
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def step(self, positions: range, seed: int, device: torch.device) -> "Step":
        """What an optimiser step at these positions of an endless stream of samples takes.

        Each epoch has an order of its own, a function of the seed: a resumed run goes on where it was.
        Raises StoreError when a stored row is damaged.
        """
        rows = [self._row(seed, position) for position in positions]
        features = {name: values[rows].to(device) for name, values in self.text_features.items()}
        return Step(self, rows, features, device)

    def _row(self, seed: int, position: int) -> int:
        place, image = divmod(position, self.images_per_prompt)
        prompts = len(self.prompts) // self.images_per_prompt
        epoch, place = divmod(place, prompts)
        return int(self._order(seed, epoch, prompts)[place]) * self.images_per_prompt + image

    def _order(self, seed: int, epoch: int, prompts: int) -> NDArray[np.int64]:
        """The epoch's permutation; two are kept, since a batch may straddle two epochs (10 M rows: 80 MB each)."""
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(prompts)
        return self._orders[seed, epoch]


@dataclass(frozen=True)
class Step:
    """The B samples of an optimiser step. Their latents are fetched a micro batch at a time."""

    train_set: TrainSet
    rows: list[int]  # of the train set
    text_features: Mapping[str, Tensor]  # reward -> (B, D), on the device
    device: torch.device

    def batch(self, first: int, size: int) -> Batch:
        """The micro batch `first` .. `first + size`."""
        own = self.rows[first : first + size]
        latents = self.train_set.latents[own].to(self.device)
        return Batch([self.train_set.prompts[row] for row in own], latents, self.text_features, first)
