"""The train prompts with their prefixes and text features, as an endless stream of batches."""

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
    """A micro batch: b of the B samples that an optimiser step takes over all micro batches and ranks."""

    prompts: list[str]  # b
    latents: Tensor  # (b, C', h, w), prefixes at the training switch: see `Sampler.prefix_shape`
    text_features: Mapping[
        str, Tensor
    ]  # reward -> (B, D) of the whole step: a reward may compare an image with the other prompts
    first: int = 0  # position of this micro batch among the B samples

    @property
    def rows(self) -> slice:
        """This micro batch's rows among the B samples."""
        return slice(self.first, self.first + len(self.prompts))

    def part(self, start: int, stop: int) -> "Batch":
        """Samples `start` .. `stop` of this micro batch."""
        return Batch(self.prompts[start:stop], self.latents[start:stop], self.text_features, self.first + start)


@dataclass(frozen=True)
class TrainSet:
    """Row i of each field belongs to sample i. Rows come from tensors, stores, or objects that compute them on request.

    images_per_prompt: number of consecutive samples, each with its own noise, that share a prompt and stay together.
    """

    prompts: Sequence[str] | pl.Series
    latents: Rows
    text_features: Mapping[str, Rows]
    images_per_prompt: int = 1
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def step(self, positions: range, seed: int, device: torch.device) -> "Step":
        """The samples of one optimiser step, by their positions in the endless stream.

        Each epoch has its own order, a function of the seed, so a resumed run continues where it was.
        Raises StoreError when a stored row is damaged.
        """
        rows = [self._row(seed, position) for position in positions]
        features = {name: values[rows].to(device) for name, values in self.text_features.items()}
        return Step(self, rows, features, device)

    def _row(self, seed: int, position: int) -> int:
        prompt, image = divmod(position, self.images_per_prompt)
        prompts = len(self.prompts) // self.images_per_prompt
        epoch, index = divmod(prompt, prompts)
        return int(self._order(seed, epoch, prompts)[index]) * self.images_per_prompt + image

    def _order(self, seed: int, epoch: int, prompts: int) -> NDArray[np.int64]:
        """The epoch's permutation. Two are kept, because a step may span two epochs (80 MB each for 10 M rows)."""
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(prompts)
        return self._orders[seed, epoch]


@dataclass(frozen=True)
class Step:
    """The B samples of an optimiser step. Latents are loaded one micro batch at a time."""

    train_set: TrainSet
    rows: list[int]  # in the train set
    text_features: Mapping[str, Tensor]  # reward -> (B, D), on the device
    device: torch.device

    def batch(self, first: int, size: int) -> Batch:
        """Samples `first` .. `first + size` of the step."""
        rows = self.rows[first : first + size]
        latents = self.train_set.latents[rows].to(self.device)
        return Batch([self.train_set.prompts[row] for row in rows], latents, self.text_features, first)
