"""A weighted sum of rewards."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from textcraftor.errors import RewardError, unknown
from textcraftor.rewards.base import Reward


class RewardMix:
    """sum of weight * reward for each image (paper section 3.2.2; its loss is minus the mean).

    rewards: by name; those without a weight are not computed.  weights: finite, at least one not zero.
    Raises RewardError for a weight of an unknown reward, or weights that reward nothing.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if name not in rewards:
                raise RewardError(unknown("reward", name, rewards))
            if not math.isfinite(weight):
                raise RewardError(f"The weight of reward {name!r} is {weight}; a finite number is needed")
        if not any(weights.values()):
            raise RewardError(f"A mix needs at least one weight other than 0, got {dict(weights)}")
        self.rewards = {name: rewards[name] for name in weights}
        self.weights = dict(weights)

    def __call__(
        self, images: Tensor, text_features: Mapping[str, Tensor], rows: slice = slice(None)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total (b,) and each reward's own, unweighted (b,), all differentiable to the images.

        images: (b, 3, H, W) float in [0, 1].  text_features: reward name -> (B, D).
        rows: which of the B the images are, where a batch is scored in parts.
        Raises RewardError when a reward's text features are missing or do not fit.
        """
        parts = {name: self.score(name, images, text_features, rows) for name in self.rewards}
        return self.total(parts), parts

    def score(self, name: str, images: Tensor, text_features: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """One reward's own, unweighted (b,). Raises RewardError when its text features are missing or do not fit."""
        if absent := self.rewards.keys() - text_features.keys():
            got = ", ".join(text_features) or "none"
            raise RewardError(f"No text features for {', '.join(sorted(absent))}; got those of: {got}")
        return self.rewards[name].score_rows(images, text_features[name], rows)

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of all rewards' (b,)."""
        return torch.stack([self.weights[name] * parts[name] for name in self.weights]).sum(dim=0)
