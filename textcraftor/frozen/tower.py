"""A layer of a reward's image tower (open_clip's and transformers' CLIP): attention and MLP, each after a norm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from textcraftor.frozen.kernels import (
    aten,
    attend,
    attend_back,
    carries_gradient_on_cpu,
    layer_norm,
    layer_norm_back,
    linear,
    linear_back,
)


class FrozenResidualAttentionBlock(ResidualAttentionBlock):
    """open_clip's, without a mask: an image tower's."""

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:
        attn = self.attn
        plain = isinstance(self.ls_1, nn.Identity) and isinstance(self.ls_2, nn.Identity) and attn.batch_first
        known = plain and attn.in_proj_weight is not None and _known(self.mlp.gelu)
        if not known or any(given is not None for given in (k_x, v_x, attn_mask)) or not carries_gradient_on_cpu(self):
            return cast(Tensor, super().forward(q_x, k_x, v_x, attn_mask))
        qkv = tuple(zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True))
        parts = _Parts(self.ln_1, qkv, attn.out_proj, attn.num_heads, self.ln_2, self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj)
        return cast(Tensor, _Layer.apply(q_x, parts))


class FrozenCLIPEncoderLayer(CLIPEncoderLayer):
    """transformers', without a mask: an image tower's."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        masked = attention_mask is not None or any(isinstance(given, Tensor) or given is True for given in kwargs.values())
        if masked or not _known(mlp.activation_fn):
            return cast(Tensor, super().forward(hidden_states, attention_mask, **kwargs))
        if not carries_gradient_on_cpu(self) or (self.training and attn.dropout):
            return cast(Tensor, super().forward(hidden_states, attention_mask, **kwargs))
        qkv = tuple((layer.weight, layer.bias) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        norms = self.layer_norm1, self.layer_norm2
        parts = _Parts(norms[0], qkv, attn.out_proj, attn.num_heads, norms[1], mlp.fc1, mlp.activation_fn, mlp.fc2)
        return cast(Tensor, _Layer.apply(hidden_states, parts))


@dataclass(frozen=True)
class _Parts:
    """What both libraries' layers are made of."""

    norm1: nn.LayerNorm
    qkv: tuple[tuple[Tensor, Tensor], ...]  # weight and bias of each
    out: nn.Linear
    heads: int
    norm2: nn.LayerNorm
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, parts: _Parts) -> Tensor:
        normed, *first = layer_norm(parts.norm1, tokens)
        q, k, v = (linear(normed, weight, bias) for weight, bias in parts.qkv)
        attended, logsumexp = attend(q, k, v, parts.heads)
        middle = linear(attended, parts.out.weight, parts.out.bias).add_(tokens)
        normed, *second = layer_norm(parts.norm2, middle)
        inner = linear(normed, parts.up.weight, parts.up.bias)
        ctx.parts = parts
        ctx.save_for_backward(tokens, *first, q, k, v, attended, logsumexp, middle, *second, inner)
        return linear(_activate(parts.activation)(inner), parts.down.weight, parts.down.bias).add_(middle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts: _Parts = ctx.parts
        tokens, mean1, scale1, q, k, v, attended, logsumexp, middle, mean2, scale2, inner = ctx.saved_tensors
        back = _activate_back(parts.activation)(linear_back(grad, parts.down.weight), inner)
        back = layer_norm_back(parts.norm2, linear_back(back, parts.up.weight), middle, mean2, scale2).add_(grad)
        grads = attend_back(linear_back(back, parts.out.weight), q, k, v, attended, logsumexp, parts.heads)
        to_q, to_k, to_v = (linear_back(one, weight) for one, (weight, _) in zip(grads, parts.qkv, strict=True))
        return layer_norm_back(parts.norm1, to_q.add_(to_k).add_(to_v), tokens, mean1, scale1).add_(back), None


def _quick_gelu(inner: Tensor) -> Tensor:
    return inner * torch.sigmoid(1.702 * inner)


def _quick_gelu_back(grad: Tensor, inner: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(1.702 * inner)
    return grad * (sigmoid + 1.702 * inner * sigmoid * (1 - sigmoid))


def _is_quick(activation: nn.Module) -> bool:
    return isinstance(activation, QuickGELU | QuickGELUActivation)


def _known(activation: nn.Module) -> bool:
    """GELU in full, or CLIP's quick approximation of it."""
    exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    return exact or isinstance(activation, GELUActivation) or _is_quick(activation)


def _activate(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    return _quick_gelu if _is_quick(activation) else F.gelu


def _activate_back(activation: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return _quick_gelu_back if _is_quick(activation) else aten.gelu_backward
