"""Detail: contrast in the fine octaves of an image, compared with a target.  An addition to the paper; needs no model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards.base import PromptFreeReward, check_batch

# Cycles per pixel, from..to. The first band includes the corners of the spectrum.
BANDS = ((1 / 4, 1.0), (1 / 8, 1 / 4), (1 / 16, 1 / 8), (1 / 32, 1 / 16))
MIN_SIDE = 32  # pixels; in smaller images the coarsest octave is empty
FLOOR = 1e-3  # keeps the logarithm finite; a quarter of an 8-bit step
TARGET = 0.05
LUMA = (0.299, 0.587, 0.114)


class Detail(PromptFreeReward):
    """How close the contrast of four octaves is to the target: 0 at best, negative for flat or noisy images.

        c_b = sqrt( sum over band b of |FFT(w (Y - mean))|^2 / (H W sum w^2) + FLOOR^2 )      rms contrast of octave b
        score = 1 - mean over b of sqrt(1 + log2(c_b / target)^2)

    Y is the luminance in [0, 1], w a Hann window, b the octaves 1/4.., 1/8..1/4, 1/16..1/8 and 1/32..1/16 cycles per pixel
    of the image, which is not resized.  Natural images have about equal contrast in every octave (Field 1987), so one
    number, config.target, is the target of all four; four photographs measured .03 to .12 at 256 to 512 px and score -.01
    to -.27.  White noise cannot score well: its contrast doubles from each octave to the next finer one, so no strength
    meets the target in all four (at best about -.45; a flat image scores -4.7).  Texture and noise of the same spectrum
    score alike; CLIP and the other rewards must tell them apart.
    """

    default_version = "1"
    resolution = 0  # images are not resized

    luma: Tensor

    def __init__(self, name: str, config: RewardConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, config, dtype)
        self.target = TARGET if config.target is None else config.target
        max_octaves_off = max(abs(torch.tensor([FLOOR, 1.0]).div(self.target).log2())).item()
        self.range = (1 - (1 + max_octaves_off**2) ** 0.5, 0.0)
        self.register_buffer("luma", torch.tensor(LUMA))

    def contrasts(self, images: Tensor) -> Tensor:
        """RMS contrast of each octave, finest first: (B, 4) float32, gradient kept.  images: (B, 3, H, W) in [0, 1].

        The mean over images with the desired amount of detail is a good target.
        Raises RewardError for images smaller than 32 px.
        """
        height, width = images.shape[-2:]
        if min(height, width) < MIN_SIDE:
            raise RewardError(f"Reward {self.name!r} needs images of {MIN_SIDE} px or more, got {height}x{width}")
        luminance = torch.einsum("bchw,c->bhw", images.float(), self.luma)
        window = torch.outer(_hann(height, images.device), _hann(width, images.device))
        mean = (luminance * window).sum((1, 2), keepdim=True) / window.sum()
        power = torch.fft.fft2(window * (luminance - mean)).abs().square() / (height * width * window.square().sum())
        axes = (torch.fft.fftfreq(side, device=images.device, dtype=torch.float32) for side in (height, width))
        frequency = torch.hypot(*torch.meshgrid(*axes, indexing="ij"))
        energy = [(power * ((frequency >= low) & (frequency < high))).sum((1, 2)) for low, high in BANDS]
        return (torch.stack(energy, dim=1) + FLOOR**2).sqrt()

    def image_features(self, images: Tensor) -> Tensor:
        """The octaves' contrasts, L2-normalised: (B, 4) float32, gradient kept."""
        return F.normalize(self.contrasts(images), dim=-1)

    def score(self, images: Tensor, text_features: Tensor) -> Tensor:
        """(B,) float32, 0 if every octave meets the target.  text_features: (B, D), ignored."""
        check_batch(self.name, images, text_features)
        octaves_off = (self.contrasts(images) / self.target).log2()
        return 1 - (1 + octaves_off.square()).sqrt().mean(dim=1)


def _hann(length: int, device: torch.device) -> Tensor:
    """A symmetric Hann window without the zeros at its ends."""
    return torch.hann_window(length + 2, periodic=False, device=device, dtype=torch.float32)[1:-1]
