"""Detail: contrast in the fine octaves of an image, held against a target. Beyond the paper; no model, no prompt."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards.base import Reward, check_batch, checked_prompts

BANDS = ((1 / 4, 1.0), (1 / 8, 1 / 4), (1 / 16, 1 / 8), (1 / 32, 1 / 16))  # cycles a pixel; the first holds the corners too
SMALLEST = 32  # pixels; below it the coarsest octave is empty
FLOOR = 1e-3  # contrast below a quarter of a byte's step is none
TARGET = 0.05
LUMA = (0.299, 0.587, 0.114)


class Detail(Reward):
    """How near the contrast of four octaves of detail is to the target; 0 at best, lower is flatter or noisier.

        c_b = sqrt( sum over band b of |FFT(w (Y - mean))|^2 / (H W sum w^2) + FLOOR^2 )      rms contrast of octave b
        score = 1 - mean over b of sqrt(1 + log2(c_b / target)^2)

    Y is the luminance in [0, 1], w a Hann window, b the octaves 1/4.., 1/8..1/4, 1/16..1/8 and 1/32..1/16 cycles a pixel of
    the image as drawn.  Natural images hold about equal contrast in every octave (Field 1987), so one number is the target
    of all four, config.target; four photographs measured .03 to .12 at 256 to 512 px, and score -.01 to -.27.
    Noise does not win: the contrast of white noise doubles from each octave to the finer one, so at no strength can it
    meet the target in all four (its best is about -.45, a flat image has -4.7).  What this cannot tell is texture from
    noise shaped like it; CLIP and the other rewards must.
    """

    default_version = "1"
    resolution = 0  # as drawn: nothing is resized

    luma: Tensor

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.target = TARGET if config.target is None else config.target
        furthest = max(abs(torch.tensor([FLOOR, 1.0]).div(self.target).log2())).item()
        self.range = (1 - (1 + furthest**2) ** 0.5, 0.0)
        self.register_buffer("luma", torch.tensor(LUMA))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, 0): no prompt is read."""
        return torch.empty(len(checked_prompts(self.name, prompts)), 0, device=self.device)

    def contrasts(self, images: Tensor) -> Tensor:
        """(B, 4) float32, rms contrast of each octave, finest first, gradient kept.  images: (B, 3, H, W) in [0, 1].

        The mean over pictures that look right is a good target.
        Raises RewardError for images below 32 px.
        """
        height, width = images.shape[-2:]
        if min(height, width) < SMALLEST:
            raise RewardError(f"Reward {self.name!r} needs images of {SMALLEST} px or more, got {height}x{width}")
        luminance = torch.einsum("bchw,c->bhw", images.float(), self.luma)
        window = torch.outer(_hann(height, images), _hann(width, images))
        mean = (luminance * window).sum((1, 2), keepdim=True) / window.sum()
        power = torch.fft.fft2(window * (luminance - mean)).abs().square() / (height * width * window.square().sum())
        frequency = torch.hypot(*torch.meshgrid(_frequencies(height, images), _frequencies(width, images), indexing="ij"))
        energy = [(power * ((frequency >= low) & (frequency < high))).sum((1, 2)) for low, high in BANDS]
        return (torch.stack(energy, dim=1) + FLOOR**2).sqrt()

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 4) float32, L2-normalised, gradient kept: the shape of the spectrum."""
        return F.normalize(self.contrasts(images), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """(B,) float32, 0 where every octave meets the target.  text_features: (B, 0), or any (B, D)."""
        check_batch(self.name, images, text_features)
        octaves_off = (self.contrasts(images) / self.target).log2()
        return 1 - (1 + octaves_off.square()).sqrt().mean(dim=1)


def _hann(length: int, like: Tensor) -> Tensor:
    """A Hann window without its zeros at both ends."""
    return torch.hann_window(length + 2, periodic=False, device=like.device, dtype=torch.float32)[1:-1]


def _frequencies(length: int, like: Tensor) -> Tensor:
    return torch.fft.fftfreq(length, device=like.device, dtype=torch.float32)
