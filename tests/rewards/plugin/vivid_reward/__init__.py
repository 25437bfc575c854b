"""An example of a third party's reward: how saturated the images are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from textcraftor.config import RewardConfig
from textcraftor.rewards import Reward


class Vivid(Reward):
    """Mean absolute difference of the channels from their mean.  A real reward would load weights from config.path."""

    default_version = "1"
    range = (0.0, 1.0)
    resolution = 0

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.gain = nn.Parameter(torch.ones(()))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), 0, device=self.device)

    def image_features(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        return self.gain * (images - images.mean(dim=1, keepdim=True)).abs().mean(dim=(1, 2, 3))
