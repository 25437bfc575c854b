"""Differentiable preprocessing for CLIP-like image towers."""

from collections.abc import Sequence
from typing import Literal

import torch
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from textcraftor.errors import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocess(nn.Module):
    """Antialiased resize, centre crop and normalisation: the towers' PIL preprocessing, on tensors.

    size: side of the square output in pixels.  mean, std: of each channel.  interpolation: bicubic for every published
    reward.  resize_mode: "shortest" resizes the shortest side to `size` and crops the centre; "squash" ignores the aspect
    ratio (SigLIP).
    The published TextCraftor code average-pools images to 224 px instead, which differs from the towers' training.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        resize_mode: Literal["shortest", "squash"] = "shortest",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size = size
        self.mean, self.std = list(mean), list(std)
        self.interpolation = InterpolationMode(interpolation)
        self.resize_mode = resize_mode
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, 3, size, size) in the tower's dtype.

        Raises RewardError for another shape or an integer dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise RewardError(f"Images must be (B, 3, H, W) float in [0, 1], got {tuple(images.shape)} of {images.dtype}")
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = self._resized_shape(*images.shape[-2:])
        # Two passes as in PIL: width, then height, each followed by clamping.
        for target in ((images.shape[-2], width), (height, width)):
            if pixels.shape[-2:] != target:
                pixels = clamp_straight_through(TF.resize(pixels, list(target), self.interpolation, antialias=True))
        pixels = TF.center_crop(pixels, [self.size, self.size])
        pixels = TF.normalize(pixels, self.mean, self.std)
        return pixels.to(self.dtype)

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) before the crop, rounded as torchvision and transformers do."""
        if self.resize_mode == "squash":
            return self.size, self.size
        long = int(self.size * max(height, width) / min(height, width))
        return (long, self.size) if height > width else (self.size, long)


def clamp_straight_through(pixels: Tensor) -> Tensor:
    """Clamp to [0, 1], as PIL does after bicubic interpolation, with the gradient of the identity.

    Rounding leaves about half of a white area above 1 after a resize. With `torch.clamp` those pixels would have no
    gradient and could never become darker.
    """
    return pixels + (pixels.clamp(0, 1) - pixels).detach()
