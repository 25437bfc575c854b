"""The CLIP constraint as a contrastive score: the batch's other prompts are negatives."""

import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.rewards.base import check_batch
from textcraftor.rewards.clip import Clip


class Contrast(Clip):
    """Log-probability of an image's own prompt among the prompts of the batch, at most 0.

    log softmax_j(scale * cos(image i, prompt j)) at j = i, with the model's logit scale: the image-to-text half of CLIP's
    training loss, negated (Radford et al. 2021, section 2.3).  Unlike the cosine, it does not rise when all images change
    in the same way.  An addition to the paper.  It depends on the batch, so it is for training, not for judging; equal
    prompts in a batch share their probability.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.range = None

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """(B,), differentiable with respect to the images.  images: (B, 3, H, W) in [0, 1].  text_features: (B, D)."""
        return self.score_rows(images, text_features, slice(None))

    def score_rows(self, images: Tensor, text_features: Tensor, rows: slice) -> Tensor:
        """(b,): each image of these rows against the prompts of the whole batch."""
        check_batch(self.name, images, text_features[rows])
        logits = self.logit_scale * self.image_features(images) @ text_features.to(images.device).T
        return logits.log_softmax(dim=-1)[:, rows].diagonal()
