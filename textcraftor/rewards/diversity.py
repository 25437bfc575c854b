"""Diversity: how unlike the images of one prompt are. Beyond the paper; against the collapse of its figure 6."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards.base import check_batch, checked_prompts
from textcraftor.rewards.openclip import OpenClipReward

FINGERPRINT = 4  # numbers of 24 bits, which float32 holds exactly


class Diversity(OpenClipReward):
    """Mean pairwise cosine distance of the images of one prompt, under any open_clip image tower.

    config.path: as for the CLIP constraint.  The same figure as `diversity` in an evaluation: 0 where all images of a
    prompt are one picture.
    Images belong together when their rows of text features are equal: those are a fingerprint of the prompt, so they
    are cached and batched like any reward's.  The batch must hold at least two images of each of its prompts.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.version = config.version or config.path
        self.range = (0.0, 2.0)
        self.text_tower = None  # no prompt is read

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 4) float32: whole numbers made from the prompt's bytes, equal for equal prompts only."""
        digests = [hashlib.sha256(prompt.encode("utf-8", "surrogatepass")) for prompt in checked_prompts(self.name, prompts)]
        rows = [[int.from_bytes(each.digest()[3 * i : 3 * i + 3]) for i in range(FINGERPRINT)] for each in digests]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def truncated(self, prompts: Sequence[str]) -> int:
        """None of them: a fingerprint has no length."""
        return 0

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """(B,): each image's prompt's mean pairwise distance, differentiable to all its images.

        text_features: (B, D), equal rows for images of one prompt.
        Raises RewardError when an image is the only one of its prompt.
        """
        check_batch(self.name, images, text_features)
        same = (text_features[:, None] == text_features[None]).all(dim=2).to(images.device)  # (B, B)
        size = same.sum(dim=1)
        if alone := int((size < 2).sum()):
            raise RewardError(
                f"Reward {self.name!r} compares images of one prompt, but {alone} of the {len(images)} images in the batch "
                "are alone with theirs. Draw at least 2 images of each prompt into a batch, or leave this reward out"
            )
        features = self.image_features(images)
        distance = (1 - features @ features.T) * (same & ~torch.eye(len(images), dtype=torch.bool, device=same.device))
        of_image = distance.sum(dim=1) / (size - 1)
        return (same.to(of_image) / size[:, None]) @ of_image
