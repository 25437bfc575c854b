"""Prefixes and text features computed for each batch instead of stored (`prepare.mode: inline`), for very many prompts."""

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
    """Replaces the store of latents. Equal to the stored rows bit for bit in the same batch, up to rounding in another.

    table: columns prompt and seed.
    """

    sampler: Sampler
    table: pl.DataFrame

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, C', h, w) float32, no gradient."""
        selected = self.table[rows]
        return self.sampler.prefix(selected["prompt"].to_list(), selected["seed"].to_list()).float()


@dataclass(frozen=True)
class InlineFeatures:
    """Replaces the store of a reward's text features. The reward must keep its text tower."""

    reward: Reward
    prompts: pl.Series

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, D) float32, no gradient."""
        prompts = self.prompts[rows].to_list()
        parts = [self.reward.text_features(prompts[i : i + TEXT_BATCH]).float() for i in range(0, len(prompts), TEXT_BATCH)]
        return torch.cat(parts)
