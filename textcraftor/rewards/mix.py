"""A weighted sum of rewards."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from textcraftor.errors import RewardError, unknown
from textcraftor.rewards.base import Reward


class RewardMix:
    """The weighted sum of rewards for each image (paper section 3.2.2; the loss is minus its mean).

    rewards: by name; those without a weight are not computed.  weights: finite, at least one not zero.
    Raises RewardError for a weight of an unknown reward, a weight that is not finite, or weights that are all zero.
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
        """The total (b,) and each reward's unweighted scores (b,), all differentiable with respect to the images.

        images: (b, 3, H, W) float in [0, 1].  text_features: reward name -> (B, D), of the whole batch.
        rows: the images' rows in the batch, if it is scored in parts.
        Raises RewardError if a reward's text features are missing or do not fit.
        """
        parts = {name: self.score(name, images, text_features, rows) for name in self.rewards}
        return self.total(parts), parts

    def score(self, name: str, images: Tensor, text_features: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """One reward's unweighted scores, (b,).  Raises RewardError if text features are missing or do not fit."""
        if missing := self.rewards.keys() - text_features.keys():
            got = ", ".join(text_features) or "none"
            raise RewardError(f"No text features for {', '.join(sorted(missing))}; got those of: {got}")
        return self.rewards[name].score_rows(images, text_features[name], rows)

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of all rewards' scores, (b,)."""
        return torch.stack([self.weights[name] * parts[name] for name in self.weights]).sum(dim=0)
