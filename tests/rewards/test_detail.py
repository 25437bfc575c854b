"""Detail: the documented formula; noisy and flat images score worse than natural ones."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from textcraftor.config import RewardConfig
from textcraftor.errors import RewardError
from textcraftor.rewards import Reward, load_reward

NO_TEXT = torch.empty(1, 0)


@pytest.fixture
def reward() -> Reward:
    return load_reward("detail", RewardConfig(kind="detail"))


def natural(size: int, contrast: float = 0.05) -> Tensor:
    """An image with equal contrast in every octave, like natural ones: amplitude 1/f, random phases."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.fftfreq(size)[None])
    spectrum = torch.fft.fft2(torch.randn(size, size)) / frequency.clamp(min=1 / size)
    grey = torch.fft.ifft2(spectrum).real
    octave = (spectrum.abs().square() * ((frequency >= 1 / 8) & (frequency < 1 / 4))).sum().sqrt() / size**2
    return (0.5 + (grey - grey.mean()) * contrast / octave).expand(1, 3, -1, -1)


def numpy_score(image: Tensor, target: float) -> float:
    """The documented formula in numpy, in double precision."""
    luminance = np.einsum("chw,c->hw", image.double().numpy(), [0.299, 0.587, 0.114])
    height, width = luminance.shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    mean = np.average(luminance, weights=window)
    power = np.abs(np.fft.fft2(window * (luminance - mean))) ** 2 / (height * width * (window**2).sum())
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    deviations = []
    for low, high in ((1 / 4, 9), (1 / 8, 1 / 4), (1 / 16, 1 / 8), (1 / 32, 1 / 16)):
        contrast = math.sqrt(power[(frequency >= low) & (frequency < high)].sum() + 1e-6)
        deviations.append(math.sqrt(1 + math.log2(contrast / target) ** 2))
    return 1 - sum(deviations) / 4


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (33, 32)])
@pytest.mark.parametrize("target", [0.05, 0.2])
def test_score_is_the_documented_formula(shape, target):
    reward = load_reward("detail", RewardConfig(kind="detail", target=target))
    images = torch.rand(3, 3, *shape)
    score = reward.score(images, torch.empty(3, 0))
    assert score.tolist() == pytest.approx([numpy_score(image, target) for image in images], abs=1e-4)


def test_a_grating_has_its_contrast_in_its_octave(reward):
    x = torch.arange(128)
    for octave, frequency in enumerate((0.35, 0.18, 0.09, 0.045)):
        grating = 0.5 + 0.2 * torch.sin(2 * math.pi * frequency * x)
        contrasts = reward.contrasts(grating.expand(1, 3, 128, 128))[0]
        assert contrasts[octave].item() == pytest.approx(0.2 / math.sqrt(2), rel=0.02)
        assert contrasts.argmax() == octave and contrasts.sum() - contrasts[octave] < 0.01


def test_noisy_flat_and_oversharp_images_score_lower(reward):
    """Noise alone at any strength, noise added to a good image, a flat image, an over-sharp one."""
    for size in (64, 256):
        picture = natural(size)
        best = reward.score(picture, NO_TEXT).item()
        assert best > -0.15
        strengths = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
        noises = [(0.5 + strength * torch.randn(1, 3, size, size)).clamp(0, 1) for strength in strengths]
        assert max(reward.score(noise, NO_TEXT).item() for noise in noises) < best - 0.2
        assert reward.score(picture + 0.15 * torch.randn(1, 3, size, size), NO_TEXT) < best - 0.05
        assert reward.score(torch.full((1, 3, size, size), 0.5), NO_TEXT) < best - 3
        assert reward.score(natural(size, 0.4), NO_TEXT) < best - 1


def test_the_gradient_adds_detail_to_a_blurred_image(reward):
    picture = torch.nn.functional.avg_pool2d(natural(64), 5, stride=1, padding=2, count_include_pad=False)
    images = picture.clone().requires_grad_()
    before = reward.score(images, NO_TEXT)
    before.sum().backward()
    moved = (images + 0.002 * images.grad / images.grad.abs().max()).detach()
    assert reward.score(moved, NO_TEXT) > before
    assert (reward.contrasts(moved)[0, 0] > reward.contrasts(picture)[0, 0]).item()


def test_a_flat_image_has_a_finite_gradient(reward):
    images = torch.full((1, 3, 40, 40), 0.5, requires_grad=True)
    reward.score(images, NO_TEXT).sum().backward()
    assert images.grad.isfinite().all()


def test_scores_stay_in_the_declared_range(reward):
    low, high = reward.range
    extremes = [torch.zeros(1, 3, 64, 64), torch.rand(1, 3, 64, 64).round(), natural(64, 0.4).clamp(0, 1)]
    assert all(low - 1e-5 <= reward.score(image, NO_TEXT).item() <= high for image in extremes)


def test_low_precision_images_are_measured_in_float32(reward):
    images = torch.rand(1, 3, 40, 40).bfloat16()
    assert torch.equal(reward.score(images, NO_TEXT), reward.score(images.float(), NO_TEXT))


def test_images_too_small_for_four_octaves_are_rejected(reward):
    with pytest.raises(RewardError, match="needs images of 32 px or more, got 40x31"):
        reward.score(torch.rand(1, 3, 40, 31), NO_TEXT)
