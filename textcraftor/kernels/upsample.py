"""Upsampling by two and a convolution of 3 x 3, as one convolution of 2 x 2: 16 products instead of 36, and no larger image.

Each pixel that nearest-neighbour upsampling made is twice its neighbour, so the 3 x 3 kernel sees only 2 x 2 pixels that
differ, in four ways: one for each place of an output pixel in its pair of rows and pair of columns. Where Winograd's way
suits the larger image, that is quicker still.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from textcraftor.kernels import winograd
from textcraftor.kernels.operators import carries_gradient_on_cpu, convolve, convolve_back, derived, in_order


class FrozenUpsample2D(Upsample2D):
    """One node of the graph, which keeps nothing; in channels-last order."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or not (self._is_plain and carries_gradient_on_cpu(self)):
            return cast(Tensor, super().forward(hidden_states, output_size, *args, **kwargs))
        return cast(Tensor, _Upsample.apply(hidden_states, self.conv))

    @property
    def _is_plain(self) -> bool:
        """As Stable Diffusion's are."""
        conv = self.conv if self.use_conv and not self.use_conv_transpose else None
        plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.bias is not None
        return plain and self.interpolate and self.norm is None


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv = conv
        b, _, h, w = images.shape
        if winograd.suits(conv, torch.Size((2 * h, 2 * w))):
            return convolve(conv, F.interpolate(images, scale_factor=2.0, mode="nearest"))
        weight = derived(conv.weight, "phases", lambda: _phases(conv.weight))
        bias = derived(cast(Tensor, conv.bias), "phases", lambda: cast(Tensor, conv.bias).detach().repeat(4))
        four = F.conv2d(in_order(images), weight, bias, padding=1)
        out = _new(images, b, conv.out_channels, 2 * h, 2 * w)
        for row, column, phase in _each(four):
            out[:, :, row::2, column::2] = phase
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        conv, (b, c, h, w) = ctx.conv, grad.shape
        if winograd.suits(conv, grad.shape):
            return F.avg_pool2d(convolve_back(conv, grad, grad.shape), 2, divisor_override=1), None
        turned = derived(conv.weight, "phases turned", lambda: in_order(_phases(conv.weight).transpose(0, 1).flip(2, 3)))
        four = _new(grad, b, 4 * c, h // 2 + 1, w // 2 + 1).zero_()
        for row, column, phase in _each(four):
            phase.copy_(grad[:, :, row::2, column::2])
        return F.conv2d(four, turned), None


def _new(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor in the order of `in_order`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _phases(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (4 O, I, 2, 2): the kernel of each place, rows before columns."""

    def pair(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, second, third = kernel.unbind(dim)
        return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)

    return in_order(torch.cat([place for rows in pair(weight.detach(), 2) for place in pair(rows, 3)]))


def _each(four: Tensor) -> list[tuple[int, int, Tensor]]:
    """(row, column, what belongs there) of (B, 4 C, h + 1, w + 1): a convolution padded on both sides is one too large."""
    height, width = four.shape[-2] - 1, four.shape[-1] - 1
    places = ((0, 0), (0, 1), (1, 0), (1, 1))
    quarters = zip(places, four.chunk(4, dim=1), strict=True)
    return [(r, c, part[:, :, r : r + height, c : c + width]) for (r, c), part in quarters]
