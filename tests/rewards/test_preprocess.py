"""Preprocessing equals PIL's resize and is differentiable."""

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.autograd import gradcheck

from textcraftor.errors import RewardError
from textcraftor.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


def difference_from_pil(image: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Absolute difference from open_clip's preprocessing of the image in 8 bits, on the scale 0..1."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    settings = PreprocessCfg(size=preprocess.size, resize_mode=preprocess.resize_mode)
    expected = image_transform_v2(settings, is_train=False)(picture)
    pixels = preprocess((image * 255).round()[None] / 255)[0]
    return (pixels - expected).abs() * torch.tensor(CLIP_STD)[:, None, None]


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 48), (48, 64), (31, 50), (9, 11), (16, 16), (16, 40)])
def test_matches_pil(shape, resize_mode):
    difference = difference_from_pil(torch.rand(3, *shape), Preprocess(16, resize_mode=resize_mode))
    assert difference.max() < 1.6 / 255  # PIL rounds to bytes after each of its two passes


@pytest.mark.parametrize("shape", [(512, 512), (768, 512), (100, 100)])
def test_overshoot_is_clamped_after_each_pass(shape):
    """As in PIL. Clamped once at the end, hard edges would differ by 11/255; without clamping, by 50/255."""
    edges = torch.rand(3, shape[0] // 4, shape[1] // 4).round().repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert difference_from_pil(edges, Preprocess(224)).max() < 1.6 / 255


def test_an_image_of_the_towers_input_size_is_only_normalised():
    images = torch.rand(2, 3, 16, 16)
    expected = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(Preprocess(16)(images), expected)


def test_gradient_agrees_with_finite_differences():
    images = 0.2 + 0.6 * torch.rand(1, 3, 7, 6, dtype=torch.float64)
    preprocess = Preprocess(4, dtype=torch.float64)
    assert gradcheck(preprocess, images.requires_grad_())


def test_white_areas_have_a_gradient():
    """Rounding leaves pixels of a white area above 1, where `torch.clamp` has no gradient."""
    images = torch.ones(1, 3, 40, 40, requires_grad=True)
    pixels = Preprocess(16)(images)
    pixels.sum().backward()
    assert (images.grad > 0).all()
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels.amax(dim=(0, 2, 3)), white)


def test_bfloat16_images_are_resized_in_float32():
    images = torch.rand(1, 3, 40, 40).bfloat16()
    assert torch.equal(Preprocess(16)(images), Preprocess(16)(images.float()))
    assert Preprocess(16, dtype=torch.bfloat16)(images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 16, 16), torch.rand(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)],
)
def test_other_shapes_and_dtypes_are_rejected(images):
    with pytest.raises(RewardError, match=r"Images must be \(B, 3, H, W\) float in \[0, 1\], got"):
        Preprocess(16)(images)
