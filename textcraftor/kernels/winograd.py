"""Convolutions of 3 x 3 over small feature maps by Winograd's F(4 x 4, 3 x 3): 36 products for 16 pixels where 144 are due.

Read as polynomials, a tile of pixels and a kernel are multiplied by their values at six points (Lavin and Gray, CVPR
2016). Ours, 0, +-sqrt(1/2), +-sqrt(2) and infinity, round more finely than the usual 0, +-1, +-2. And they are their own
reciprocals: a kernel turned around has the same values in the opposite order, so one set of them serves both ways.
"""

import functools
import math
from typing import cast

import torch
from torch import Tensor, nn

ROOT = math.sqrt(2)
POINTS = (0.0, 1 / ROOT, -1 / ROOT, -ROOT, ROOT)  # and infinity; from both ends, each with its reciprocal
TILE, KERNEL, VALUES = 4, 3, 6
LARGEST_MAP = 64  # pixels: pixels become values by one matrix for the whole map, too much work for a larger one
FEWEST_CHANNELS = 32  # to and from: the products must outweigh the way to the values and back
MOST_BYTES = 4 << 20  # of a layer's values, four times its weights: a CPU's cache holds them


def suits(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether this is the quicker way on a CPU for images of `shape`, (..., h, w), channels-last."""
    height, width = shape[-2:]
    tiles = height % TILE == 0 and width % TILE == 0 and height * width <= LARGEST_MAP
    plain = layer.kernel_size == (3, 3) and layer.stride == layer.dilation == (1, 1) and layer.padding == (1, 1)
    if not (tiles and plain and layer.groups == 1 and layer.weight.dtype == torch.float32):
        return False
    to, of = layer.out_channels, layer.in_channels
    return min(to, of) >= FEWEST_CHANNELS and to * of * VALUES**2 * 4 <= MOST_BYTES


def values_of(weight: Tensor) -> Tensor:
    """The kernels' values at the points: (O, C, 3, 3) -> (36, C, O)."""
    rows, _, _ = _axis()
    values = torch.einsum("iy,jx,ocyx->ijco", rows, rows, weight.detach().double())
    return values.flatten(0, 1).float().contiguous()


def convolve(images: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with zero padding: (B, C, h, w) -> (B, O, h, w)."""
    return _convolve(images, values, bias, turned=False)


def convolve_back(grad: Tensor, values: Tensor) -> Tensor:
    """The gradient to the images: the convolution with the kernels turned around, (B, O, h, w) -> (B, C, h, w)."""
    return _convolve(grad, values.transpose(1, 2), None, turned=True)


def _convolve(images: Tensor, values: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    b, c, h, w = images.shape
    to_values, to_pixels = _transforms(h, w, turned)
    rows, columns, channels = h // TILE, w // TILE, values.shape[2]
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)
    of_tiles = torch.matmul(to_values, pixels).view(-1, VALUES**2, c)
    products = torch.bmm(of_tiles.transpose(0, 1), values)  # (36, B * tiles, O)
    tiles = (to_pixels @ products.flatten(1)).view(TILE, TILE, b, rows, columns, channels)
    out = tiles.permute(2, 3, 0, 4, 1, 5).reshape(b, h, w, channels)
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2)


@functools.cache
def _transforms(height: int, width: int, turned: bool) -> tuple[Tensor, Tensor]:
    """(a map's pixels to its tiles' values, (tiles * 36, h * w); a tile's values to its pixels, (16, 36))."""
    _, of_pixels, to_pixels = _axis()
    if turned:
        of_pixels, to_pixels = of_pixels.flip(0), to_pixels.flip(1)

    def along(size: int) -> Tensor:
        padded = torch.zeros(size // TILE, VALUES, size + 2, dtype=torch.float64)
        for index, tile in enumerate(padded):
            tile[:, index * TILE : index * TILE + VALUES] = of_pixels
        return padded[:, :, 1:-1]

    whole = torch.einsum("aiy,bjx->abijyx", along(height), along(width)).reshape(-1, height * width)
    return whole.float(), torch.kron(to_pixels, to_pixels).float()


@functools.cache
def _axis() -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, in float64: (a kernel's values, (6, 3); six pixels' values, (6, 6); four pixels of values, (4, 6)).

    Toom and Cook's product of polynomials, transposed. A kernel's values are scaled to weights that sum to one.
    """

    def powers(count: int) -> Tensor:
        at_infinity = [0.0] * (count - 1) + [1.0]
        return torch.tensor([[point**power for power in range(count)] for point in POINTS] + [at_infinity], dtype=torch.float64)

    of_kernel = powers(KERNEL)
    scale = of_kernel.abs().sum(1, keepdim=True)
    return of_kernel / scale, cast(Tensor, torch.linalg.inv(powers(VALUES))).T * scale, powers(TILE).T
