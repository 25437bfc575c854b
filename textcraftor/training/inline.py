"""What `prepare` would have stored, computed for each batch anew: one pass over more prompts than a disk holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from textcraftor.cache.prepare import TEXT_BATCH
from textcraftor.chain.sampler import Sampler
from textcraftor.rewards import Reward


@dataclass(frozen=True)
class InlinePrefixes:
    """In place of the stored latents: those of the same batch to the bit, of another by rounding.

    table: prompt and seed of each row.
    """

    sampler: Sampler
    table: pl.DataFrame

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, C', h, w) float32, no gradient."""
        wanted = self.table[rows]
        return self.sampler.prefix(wanted["prompt"].to_list(), wanted["seed"].to_list()).float()


@dataclass(frozen=True)
class InlineFeatures:
    """In place of a reward's stored text features; it must keep its text tower."""

    reward: Reward
    prompts: pl.Series

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, D) float32, no gradient."""
        prompts = self.prompts[rows].to_list()
        parts = [self.reward.text_features(prompts[i : i + TEXT_BATCH]).float() for i in range(0, len(prompts), TEXT_BATCH)]
        return torch.cat(parts)
