"""What frozen layers and blocks compute with: forwards, and backwards to the input alone.

Nothing here records a graph. Images are channels-last on a CPU, where oneDNN convolves that way without reordering;
tokens are (B, T, C). A weight that never changes is kept in the order that its kernel wants.
"""

import functools
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.utils.weak import WeakTensorKeyDictionary

from textcraftor.kernels import winograd

aten = torch.ops.aten
_derived = WeakTensorKeyDictionary()  # weight -> {kind: (what it was made from, tensor)}; goes with the weight


def carries_gradient(module: nn.Module) -> bool:
    """Whether a gradient goes through a module whose weights want none.

    Not under autocast, as in a UNet of float32 weights with a low-rank update: the library's own layers round as it says.
    """
    return torch.is_grad_enabled() and not _is_under_autocast() and not _is_trained(module)


def carries_gradient_on_cpu(module: nn.Module) -> bool:
    """The same of a block, whose kernels are the CPU's and float32; elsewhere torch.compile does what it does."""
    weight = next(module.parameters())
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and carries_gradient(module)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias: (..., I) -> (..., O)."""
    if not _is_packed(rows):
        return F.linear(rows, weight, bias)
    packed = derived(weight, "packed", lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None))
    return _multiply(rows, packed, bias)


def linear_back(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """grad @ weight: (..., O) -> (..., I); added to `onto`, of two dimensions, where that is given."""
    if not _is_packed(grad):
        return grad @ weight if onto is None else onto.addmm_(grad, weight)
    make = lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().T.contiguous(), None)  # noqa: E731
    back = _multiply(grad, derived(weight, "packed transposed", make), None)
    return back if onto is None else onto.add_(back)


def convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """The layer's convolution with zero padding."""
    images, weight = in_order(images), layer.weight
    if images.device.type == "cpu" and layer.groups == 1:
        if layer.kernel_size == (1, 1) and layer.stride == (1, 1):
            return to_images(linear(to_tokens(images), weight.flatten(1), layer.bias), images)
        if _cuts_patches(layer, images.shape):
            rows = _patches(images, layer.kernel_size)
            out = linear(rows.flatten(0, 2), weight.flatten(1), layer.bias)
            return out.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)
        if winograd.suits(layer, images.shape):
            values = derived(weight, "winograd", lambda: winograd.values_of(weight))
            return winograd.convolve(images, values, layer.bias)
        weight = derived(weight, "in order", lambda: in_order(weight.detach()))
    return F.conv2d(images, weight, layer.bias, layer.stride, cast(Any, layer.padding), layer.dilation, layer.groups)


def convolve_back(layer: nn.Conv2d, grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient to the images, of `shape`: with a stride of 1 it is a convolution with the kernels turned around."""
    grad, weight = in_order(grad), layer.weight
    if grad.device.type == "cpu" and layer.groups == 1:
        if layer.kernel_size == (1, 1) and layer.stride == (1, 1):
            return to_images(linear_back(to_tokens(grad), weight.flatten(1)), grad)
        if _cuts_patches(layer, shape):
            (b, c, h, w), size = shape, layer.kernel_size
            rows = linear_back(to_tokens(grad), weight.flatten(1))
            return rows.view(b, h // size[0], w // size[1], c, *size).permute(0, 3, 1, 4, 2, 5).reshape(shape)
        if winograd.suits(layer, shape):
            values = derived(weight, "winograd", lambda: winograd.values_of(weight))
            return winograd.convolve_back(grad, values)
        turned = tuple(size - 1 - padding for size, padding in zip(layer.kernel_size, cast(Any, layer.padding), strict=True))
        if layer.stride == (1, 1) and layer.dilation == (1, 1) and min(turned) >= 0:
            make = lambda: in_order(weight.detach().transpose(0, 1).flip(2, 3))  # noqa: E731
            return F.conv2d(grad, derived(weight, "turned", make), None, 1, turned)
    settings = (layer.stride, cast(Any, layer.padding), layer.dilation, layer.groups)
    return cast(Tensor, conv2d_input(cast(Any, shape), weight, grad, *settings))


def group_norm(layer: nn.GroupNorm, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean, 1 / deviation)."""
    b, c, h, w = images.shape
    return cast(Any, aten.native_group_norm(images, layer.weight, layer.bias, b, c, h * w, layer.num_groups, layer.eps))


def group_norm_back(layer: nn.GroupNorm, grad: Tensor, images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient to `images`, with what `group_norm` returned beside them."""
    b, c, h, w = images.shape
    back = aten.native_group_norm_backward
    return cast(
        Tensor, back(in_order(grad), images, mean, scale, layer.weight, b, c, h * w, layer.num_groups, [True, False, False])[0]
    )


def layer_norm(layer: nn.LayerNorm, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean, 1 / deviation)."""
    return cast(Any, aten.native_layer_norm(tokens, layer.normalized_shape, layer.weight, layer.bias, layer.eps))


def layer_norm_back(layer: nn.LayerNorm, grad: Tensor, tokens: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient to `tokens`."""
    back = aten.native_layer_norm_backward
    wanted = [True, False, False]
    return cast(Tensor, back(grad, tokens, layer.normalized_shape, mean, scale, layer.weight, layer.bias, wanted)[0])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, batch: int) -> tuple[Tensor, Tensor]:
    """Attention of (B * T, C) queries to B * S keys and values: (B * T, C), and the softmax's logarithmic sum, (B, T)."""
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*(_split(t, heads, batch) for t in (q, k, v)))
    return _merged(out), logsumexp


def attend_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, heads: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v, with what `attend` returned."""
    split = [_split(t, heads, batch) for t in (grad, q, k, v, out)]
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*split, logsumexp, 0.0, False)
    return cast(Any, tuple(map(_merged, grads)))


def in_order(images: Tensor) -> Tensor:
    """The images in the order that convolutions are quickest in: channels-last on a CPU."""
    return images.contiguous(memory_format=torch.channels_last if images.device.type == "cpu" else torch.contiguous_format)


def to_tokens(images: Tensor) -> Tensor:
    """(B, C, h, w) -> (B*h*w, C); no copy of channels-last images."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def to_images(tokens: Tensor, like: Tensor) -> Tensor:
    """(B*h*w, C) -> (B, C, h, w), channels-last; h and w are those of `like`."""
    return tokens.view(-1, *like.shape[-2:], tokens.shape[-1]).permute(0, 3, 1, 2)


def derived(weight: Tensor, kind: str, make: Callable[[], Tensor], *others: Tensor) -> Tensor:
    """What `make` makes of a weight and others, made again when one has changed. A view is its base and its place."""
    owner = weight if weight._base is None else weight._base
    place = (kind, weight.storage_offset(), weight.shape)
    state = tuple((of.data_ptr(), of._version) for of in (weight, *others))
    kept = _derived.setdefault(owner, {})
    if place not in kept or kept[place][0] != state:
        kept[place] = state, make()
    return cast(Tensor, kept[place][1])


def stacked(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers with the same input as one layer's, whose output is theirs side by side."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weight = derived(weights[0], "stacked", lambda: torch.cat([of.detach() for of in weights]), *weights[1:])
    if all(bias is None for bias in biases):
        return weight, None
    if any(bias is None for bias in biases):
        raise RuntimeError("Of layers that are computed as one, all have a bias or none has")
    return weight, derived(biases[0], "stacked", lambda: torch.cat([of.detach() for of in biases]), *biases[1:])


def derived_bytes(modules: Iterable[nn.Module]) -> int:
    """The memory of what `derived` keeps of the modules' weights."""
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    made = [tensor for weight in weights.values() for _, tensor in _derived.get(weight, {}).values()]
    return sum(_bytes(tensor) for tensor in made)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_under_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _is_trained(module: nn.Module) -> bool:
    """Whether any weight wants a gradient. Asked at every call, and several times quicker than by `parameters()`."""
    if any(weight is not None and weight.requires_grad for weight in module._parameters.values()):
        return True
    return any(child is not None and _is_trained(child) for child in module._modules.values())


def _cuts_patches(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether the kernel's places do not overlap and cover the images: a vision transformer's first layer."""
    whole = all(side % size == 0 for side, size in zip(shape[2:], layer.kernel_size, strict=True))
    return whole and layer.stride == layer.kernel_size and layer.padding == (0, 0) and layer.dilation == (1, 1)


def _patches(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, h * kh, w * kw) -> (B, h, w, C * kh * kw)."""
    b, c, height, width = images.shape
    cut = images.view(b, c, height // size[0], size[0], width // size[1], size[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], ""))


def _is_packed(rows: Tensor) -> bool:
    return _packs() and rows.device.type == "cpu" and rows.dtype == torch.float32


@functools.cache
def _packs() -> bool:
    """Whether oneDNN multiplies, with packed weights. MKL, behind torch's own, is as quick on Intel's processors alone."""
    return torch.backends.mkldnn.is_available() and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


def _split(tokens: Tensor, heads: int, batch: int) -> Tensor:
    return tokens.view(batch, -1, heads, tokens.shape[-1] // heads).transpose(1, 2)


def _merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
