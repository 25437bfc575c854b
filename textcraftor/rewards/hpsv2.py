"""Human Preference Score v2."""

import re
from pathlib import Path

import torch

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError, unknown
from textcraftor.rewards.openclip import OpenClipReward

VERSIONS = ("2.0", "2.1", "tiny")


class HPSv2(OpenClipReward):
    """Cosine of each image with its own prompt under a CLIP ViT-H/14 fine-tuned on human choices, without logit scale.

    config.path: the published checkpoint (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt, or either as safetensors), or an
    open_clip folder.  config.version: required, one of VERSIONS; scores of two versions are not comparable (SD 1.4 scores
    .2695 under 2.0 and .2535 under 2.1).  Raises RewardError for another version, and for a file
    with the published name of another version.
    Source: Wu et al. 2023, arXiv 2306.09341.
    """

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        if config.version not in VERSIONS:
            message = unknown(f"version of reward {name!r}", config.version, VERSIONS)
            raise RewardError(f"{message} Set rewards.{name}.version")
        published = re.search(r"hps_?v(2(?:\.[01])?)[_.-]", Path(config.path).name.lower())
        if published and config.version != (holds := "2.1" if published[1] == "2.1" else "2.0"):
            raise RewardError(
                f"rewards.{name}.path = {config.path} is the file of HPSv2 {holds}, and rewards.{name}.version = "
                f"{config.version}: their scores are not comparable. Set the version to {holds}, or give the other file"
            )
        super().__init__(name, config, dtype, file_architecture="ViT-H-14")
