"""Single layers: those that belong to no block that we know."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from textcraftor.kernels.operators import carries_gradient, convolve, convolve_back, linear, linear_back
from textcraftor.kernels.twins import shared_half, twins


class FrozenLinear(nn.Linear):
    """Multiplies with packed weights on a CPU that is faster so."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Linear.apply(input, self)) if carries_gradient(self) else super().forward(input)


class FrozenConv2d(nn.Conv2d):
    """Keeps no input: the gradient to it does not depend on it."""

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not carries_gradient(self):
            return super().forward(input)
        half = shared_half(input)
        out = cast(Tensor, _Conv2d.apply(half, self))
        return out if half is input else twins(out)


class FrozenGEGLU(GEGLU):
    """Keeps the projection alone, and computes its GELU again going back."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not carries_gradient(self.proj):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        return cast(Tensor, _Gate.apply(self.proj(hidden_states)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return linear(rows, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return linear_back(grad, ctx.layer.weight), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, images.shape
        return convolve(layer, images)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return convolve_back(ctx.layer, grad, ctx.shape), None


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
