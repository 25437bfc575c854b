"""The CLIP constraint with its neighbours as counter-examples."""

import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.rewards.base import check_batch
from textcraftor.rewards.clip import Clip


class Contrast(Clip):
    """How surely an image is recognised as its own prompt's among the prompts of the batch: a log-probability, <= 0.

    log softmax_j(scale * cos(image i, prompt j)) at j = i, with the model's own logit scale: CLIP's training loss,
    image to text (Radford et al. 2021, section 2.3).  A cosine also rises when images grow alike in a way the tower
    likes; this does not.  Beyond the paper.  It depends on the batch, so it trains and does not judge; equal prompts
    in a batch share their probability.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.range = None

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """(B,), differentiable to the images.  images: (B, 3, H, W) in [0, 1].  text_features: (B, D)."""
        return self.score_rows(images, text_features, slice(None))

    def score_rows(self, images: Tensor, text_features: Tensor, rows: slice) -> Tensor:
        """(b,): the images of these rows, each among the prompts of the whole batch."""
        check_batch(self.name, images, text_features[rows])
        logits = self.logit_scale * self.image_features(images) @ text_features.to(images.device).T
        return logits.log_softmax(dim=-1)[:, rows].diagonal()
