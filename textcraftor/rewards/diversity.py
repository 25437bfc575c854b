"""Diversity of the images of one prompt.  An addition to the paper, against the collapse that its figure 6 shows."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards.base import check_batch, validate_prompts
from textcraftor.rewards.openclip import OpenClipReward

FINGERPRINT = 4  # integers of 24 bits, which float32 represents exactly


class Diversity(OpenClipReward):
    """Mean pairwise cosine distance of the images of one prompt, under any open_clip image tower.

    config.path: as for the CLIP constraint.  The same quantity as `diversity` in an evaluation; 0 if all images of a
    prompt are equal.
    Images are grouped by their rows of text features, which are a hash of the prompt and are cached and batched like any
    reward's.  A batch must hold at least two images of each of its prompts.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.range = (0.0, 2.0)
        self.text_tower = None  # prompts are hashed, not encoded

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """A hash of each prompt as integers: (B, 4) float32, with equal rows for equal prompts only."""
        prompts = validate_prompts(self.name, prompts)
        digests = [hashlib.sha256(prompt.encode("utf-8", "surrogatepass")) for prompt in prompts]
        rows = [[int.from_bytes(each.digest()[3 * i : 3 * i + 3]) for i in range(FINGERPRINT)] for each in digests]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def truncated(self, prompts: Sequence[str]) -> int:
        """0: the whole prompt is hashed."""
        return 0

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Mean pairwise distance of the images of each image's prompt: (B,), differentiable with respect to all of them.

        text_features: (B, D), equal rows for images of one prompt.
        Raises RewardError if an image is the only one of its prompt.
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
        per_image = distance.sum(dim=1) / (size - 1)
        return (same.to(per_image) / size[:, None]) @ per_image
