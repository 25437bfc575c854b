"""Layers of modules that are not trained: the same numbers, with less kept and, on a CPU, more quickly.

torch's convolution keeps its input for the gradient of its weights even where nobody wants that; gated GELU keeps what it
could compute again. And a weight that never changes can be packed once for oneDNN, which on some processors multiplies
float32 matrices much faster than the library behind `torch.nn.Linear`.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


def economise(module: nn.Module) -> None:
    """Put the layers below in place of a frozen module's own. Its weights, their names and its type checks stay.

    A layer whose weights require a gradient (in a copy that is trained) works as torch's own, and so does each where no
    gradient is carried.
    """
    for layer in module.modules():
        if (own := OWN.get(type(layer))) is not None:
            layer.__class__ = own


class FrozenLinear(nn.Linear):
    """Multiplies with packed weights on a CPU, in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Linear.apply(input, self)) if _carries_gradient(self) else super().forward(input)

    def times(self, rows: Tensor) -> Tensor:
        """rows @ weight.T + bias."""
        if not _is_packed(rows):
            return F.linear(rows, self.weight, self.bias)
        return _multiply(rows, self._packed(False), self.bias)

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows @ weight."""
        return _multiply(rows, self._packed(True), None) if _is_packed(rows) else rows @ self.weight

    def _packed(self, transposed: bool) -> Tensor:
        """The weight in oneDNN's order, made again when it has changed."""
        state = (self.weight.data_ptr(), self.weight._version)
        kept: dict[bool, tuple[Any, Tensor]] = self.__dict__.setdefault("_orders", {})
        if transposed not in kept or kept[transposed][0] != state:
            weight = self.weight.detach().T if transposed else self.weight.detach()
            kept[transposed] = state, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return kept[transposed][1]


class FrozenConv2d(nn.Conv2d):
    """Keeps no input: the gradient to it does not depend on it."""

    def forward(self, input: Tensor) -> Tensor:
        plain = self.padding_mode != "zeros" or isinstance(self.padding, str)
        return super().forward(input) if plain or not _carries_gradient(self) else cast(Tensor, _Conv2d.apply(input, self))


class FrozenGEGLU(GEGLU):
    """Keeps the projection alone, and computes its GELU again going back."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _carries_gradient(self.proj):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        return cast(Tensor, _Gate.apply(self.proj(hidden_states)))


def _carries_gradient(layer: Any) -> bool:
    """Through a frozen layer. Where none is carried, torch's own kernels: a prefix has the same bits, cached or not."""
    return torch.is_grad_enabled() and not layer.weight.requires_grad


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], ""))


def _is_packed(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()


OWN: dict[type, type] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d, GEGLU: FrozenGEGLU}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.times(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layer.times_transposed(grad), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, images.shape
        return layer._conv_forward(images, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layer = ctx.layer
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return conv2d_input(ctx.shape, layer.weight, grad, *settings), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * hidden, gate)], dim=-1)
