"""From images to the pixels that a CLIP-like tower was trained on, differentiably."""

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
    """Resize (antialiased), centre crop, normalise: the towers' own PIL preprocessing on tensors.

    size: pixels of the square tower input.  mean, std: of each channel.  interpolation: bicubic for
    every published reward.  resize_mode: "shortest" resizes the shortest side to `size` and crops the
    centre; "squash" ignores the aspect ratio (SigLIP).
    The published TextCraftor code average-pools images down to 224 px instead, which the towers never saw.
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

        Raises RewardError when `images` is no such batch.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise RewardError(f"Images must be (B, 3, H, W) float in [0, 1], got {tuple(images.shape)} of {images.dtype}")
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = self._resized(*images.shape[-2:])
        # Width first, then height, clipped after each: PIL's two passes.
        for target in ((images.shape[-2], width), (height, width)):
            if pixels.shape[-2:] != target:
                pixels = _clipped(TF.resize(pixels, list(target), self.interpolation, antialias=True))
        pixels = TF.center_crop(pixels, [self.size, self.size])
        pixels = TF.normalize(pixels, self.mean, self.std)
        return pixels.to(self.dtype)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) before the crop, rounded as torchvision and transformers do."""
        if self.resize_mode == "squash":
            return self.size, self.size
        long = int(self.size * max(height, width) / min(height, width))
        return (long, self.size) if height > width else (self.size, long)


def _clipped(pixels: Tensor) -> Tensor:
    """Clipped to [0, 1] in value, as PIL clips bicubic's overshoot; the gradient passes unclipped.

    Rounding puts about half of a white area above 1 after a resize. A true clamp would cut those pixels
    off from the gradient, and they could never leave white again.
    """
    return pixels + (pixels.clamp(0, 1) - pixels).detach()
