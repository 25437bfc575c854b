"""Winograd's convolutions: torch's numbers to rounding, both ways, and only where they are the quicker ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.grad import conv2d_input

from textcraftor.kernels import derived_bytes, economise, operators, winograd

MAPS = [(4, 4), (8, 8), (4, 12), (16, 4)]


def convolution(of: int = 40, to: int = 32, **settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(of, to, **{"kernel_size": 3, "padding": 1, **settings}).requires_grad_(False)  # type: ignore[arg-type]


def apart(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("biased", [True, False])
def test_the_convolution_and_its_gradient_to_rounding(size: tuple[int, int], biased: bool) -> None:
    layer = convolution(bias=biased)
    images = torch.randn(3, 40, *size)
    grad = torch.randn(3, 32, *size)
    assert winograd.suits(layer, images.shape)
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    exact = F.conv2d(images.double(), weight, bias, padding=1)
    exact_back = conv2d_input(images.shape, weight, grad.double(), padding=1)  # type: ignore[arg-type]
    assert apart(operators.convolve(layer, images), exact) < 3e-6
    assert apart(operators.convolve_back(layer, grad, images.shape), exact_back) < 3e-6


def test_the_points_round_more_finely_than_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = convolution(112, 112), torch.randn(4, 112, 4, 4)
    exact = F.conv2d(images.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]

    def error() -> float:
        winograd._axis.cache_clear()
        winograd._transforms.cache_clear()
        return apart(winograd.convolve(operators.in_order(images), winograd.values_of(layer.weight), layer.bias), exact)

    ours = error()
    with monkeypatch.context() as usual:
        usual.setattr(winograd, "POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
        theirs = error()
    error()
    assert 1e-8 < ours < 0.7 * theirs


def test_the_frozen_layer_takes_this_way_and_keeps_one_set_of_values_for_both_directions() -> None:
    layer = convolution()
    plain = copy.deepcopy(layer)
    economise(nn.Sequential(layer))
    images = torch.randn(2, 40, 8, 8)

    def both(of: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = images.clone().requires_grad_()
        made = of(leaf)
        return made.detach(), torch.autograd.grad(made.square().sum(), leaf)[0]

    for _ in range(2):
        for ours, theirs in zip(both(layer), both(plain), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert derived_bytes([layer]) == 36 * 40 * 32 * 4
        for of in (layer, plain):
            of.weight.mul_(1.5)  # the values are made again


@pytest.mark.parametrize("channels", [32, 48])
def test_an_upsampled_map_takes_this_way(channels: int) -> None:
    torch.manual_seed(0)
    plain = Upsample2D(channels, use_conv=True, out_channels=channels).requires_grad_(False)
    frozen = copy.deepcopy(plain)
    economise(nn.Sequential(frozen))
    results = []
    for layer in (plain, frozen):
        leaf = torch.linspace(-1, 1, 2 * channels * 16).view(2, channels, 4, 4).requires_grad_()
        made = layer(leaf)
        gradient = torch.autograd.grad((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum(), leaf)[0]
        results.append((made.detach(), gradient))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert derived_bytes([frozen]) == 36 * channels * channels * 4


ELSEWHERE = {
    "a large map": (convolution(), (16, 16)),
    "a cut tile": (convolution(), (6, 8)),
    "half a tile": (convolution(), (8, 2)),
    "few channels from": (convolution(of=4), (8, 8)),
    "few channels to": (convolution(to=4), (8, 8)),
    "large weights": (convolution(of=320, to=320), (8, 8)),
    "stride": (convolution(stride=2), (8, 8)),
    "no padding": (convolution(padding=0), (8, 8)),
    "dilation": (convolution(padding=2, dilation=2), (8, 8)),
    "a larger kernel": (convolution(kernel_size=5, padding=2), (8, 8)),
    "groups": (convolution(groups=8), (8, 8)),
    "half precision": (convolution().to(torch.bfloat16), (8, 8)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_the_convolution_stays_as_it_is(name: str) -> None:
    layer, size = ELSEWHERE[name]
    assert not winograd.suits(layer, torch.Size((2, layer.in_channels, *size)))
