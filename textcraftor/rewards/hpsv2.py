"""Human Preference Score v2."""

import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError, unknown
from textcraftor.rewards.openclip import OpenClipReward

VERSIONS = ("2.0", "2.1", "tiny")


class HPSv2(OpenClipReward):
    """Cosine of image and prompt under a CLIP ViT-H/14 tuned on human choices, diagonal, no scale.

    config.path: the published checkpoint (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt, or either as
    safetensors), or an open_clip folder.  config.version says which of VERSIONS it is, since the
    scores of two versions are NOT comparable: SD 1.4 scores .2695 under 2.0 and .2535 under 2.1.
    Source: Wu et al. 2023, arXiv 2306.09341.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        if config.version not in VERSIONS:
            message = unknown(f"version of reward {name!r}", config.version, VERSIONS)
            raise RewardError(f"{message} Set rewards.{name}.version")
        super().__init__(name, config, dtype, file_architecture="ViT-H-14")
