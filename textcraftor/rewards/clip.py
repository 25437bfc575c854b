"""The CLIP constraint: how well an image fits its prompt."""

import torch

from textcraftor.config import RewardConfig
from textcraftor.rewards.openclip import OpenClipReward


class Clip(OpenClipReward):
    """Cosine similarity of image and prompt under any open_clip model, diagonal, no scale.

    Always in the mix with a weight > 0, or a single reward collapses the model (paper section 3.2.2 and
    figure 6). Published with "ViT-g-14:laion2b_s34b_b88k"; SD 1.5 scores .24 to .30.
    Its version is the model's own name.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.version = config.version or config.path
