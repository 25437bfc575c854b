"""The residual block of UNet and VAE: norm, SiLU, convolution, twice; of it only the two norms' inputs are kept."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from textcraftor.kernels.operators import (
    aten,
    carries_gradient_on_cpu,
    convolve,
    convolve_back,
    group_norm,
    group_norm_back,
    in_order,
    linear,
)
from textcraftor.kernels.twins import shared_half, twins


class FrozenResnetBlock2D(ResnetBlock2D):
    """One node of the graph, in channels-last order."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not (self._is_plain and carries_gradient_on_cpu(self)):
            return cast(Tensor, super().forward(input_tensor, temb, *args, **kwargs))
        half = shared_half(input_tensor)
        if half is input_tensor or not _is_twice(temb):
            return cast(Tensor, _Block.apply(input_tensor, temb, self))
        return twins(cast(Tensor, _Block.apply(half, temb if temb is None else temb[: len(half)], self)))

    @property
    def _is_plain(self) -> bool:
        """As Stable Diffusion's blocks are, the VAE's too: its kind of norm is "group". A timestep's embedding is frozen."""
        return (
            isinstance(self.nonlinearity, nn.SiLU)
            and (self.time_embedding_norm == "default" or self.time_emb_proj is None)
            and self.time_embedding_norm != "scale_shift"
            and not (self.skip_time_act or self.up or self.down or (self.training and self.dropout.p))
        )


def _is_twice(temb: Tensor | None) -> bool:
    """Whether the timestep's embedding is the same for both halves of guidance. SDXL adds the prompt to it."""
    return temb is None or torch.equal(*temb.chunk(2))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, temb: Tensor | None, block: Any) -> Tensor:
        if temb is not None and temb.requires_grad:
            raise RuntimeError("A frozen residual block sends no gradient to the timestep's embedding")
        images = in_order(images)
        normed, *first = group_norm(block.norm1, images)
        inner = convolve(block.conv1, F.silu(normed, inplace=True))
        if block.time_emb_proj is not None and temb is not None:
            inner.add_(linear(F.silu(temb), block.time_emb_proj.weight, block.time_emb_proj.bias)[:, :, None, None])
        normed, *second = group_norm(block.norm2, inner)
        out = convolve(block.conv2, F.silu(normed, inplace=True))
        out.add_(images if block.conv_shortcut is None else convolve(block.conv_shortcut, images))
        ctx.block = block
        ctx.save_for_backward(images, *first, inner, *second)
        return out if block.output_scale_factor == 1 else out.div_(block.output_scale_factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        block, (images, *first, inner, inner_mean, inner_scale) = ctx.block, ctx.saved_tensors
        if block.output_scale_factor != 1:
            grad = grad / block.output_scale_factor
        back = convolve_back(block.conv2, grad, inner.shape)
        back = _norm_silu_back(block.norm2, back, inner, inner_mean, inner_scale)
        back = convolve_back(block.conv1, back, images.shape)
        back = _norm_silu_back(block.norm1, back, images, *first)
        back += grad if block.conv_shortcut is None else convolve_back(block.conv_shortcut, grad, images.shape)
        return back, None, None


def _norm_silu_back(norm: nn.GroupNorm, grad: Tensor, images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Through SiLU(norm(images)), in the place of `grad`; what the norm gave is computed again."""
    aten.silu_backward.grad_input(grad, group_norm(norm, images)[0], grad_input=grad)
    return group_norm_back(norm, grad, images, mean, scale)
