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

from textcraftor.kernels.operators import (
    aten,
    attend,
    attend_back,
    carries_gradient_on_cpu,
    layer_norm,
    layer_norm_back,
    linear,
    linear_back,
    stacked,
)


class FrozenResidualAttentionBlock(ResidualAttentionBlock):
    """open_clip's, without a mask: an image tower's."""

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:
        attn = self.attn
        plain = isinstance(self.ls_1, nn.Identity) and isinstance(self.ls_2, nn.Identity) and attn.batch_first
        known = plain and attn.in_proj_weight is not None and _known(self.mlp.gelu)
        if not known or any(given is not None for given in (k_x, v_x, attn_mask)) or not carries_gradient_on_cpu(self):
            return cast(Tensor, super().forward(q_x, k_x, v_x, attn_mask))
        qkv = attn.in_proj_weight, attn.in_proj_bias
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
        qkv = stacked(attn.q_proj, attn.k_proj, attn.v_proj)
        norms = self.layer_norm1, self.layer_norm2
        parts = _Parts(norms[0], qkv, attn.out_proj, attn.num_heads, norms[1], mlp.fc1, mlp.activation_fn, mlp.fc2)
        return cast(Tensor, _Layer.apply(hidden_states, parts))


@dataclass(frozen=True)
class _Parts:
    """What both libraries' layers are made of."""

    norm1: nn.LayerNorm
    qkv: tuple[Tensor, Tensor | None]  # weight and bias of all three
    out: nn.Linear
    heads: int
    norm2: nn.LayerNorm
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, parts: _Parts) -> Tensor:
        shape, batch = tokens.shape, len(tokens)
        tokens = tokens.flatten(0, 1)
        normed, *first = layer_norm(parts.norm1, tokens)
        qkv = linear(normed, *parts.qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        attended, logsumexp = attend(q, k, v, parts.heads, batch)
        middle = linear(attended, parts.out.weight, parts.out.bias).add_(tokens)
        normed, *second = layer_norm(parts.norm2, middle)
        inner = linear(normed, parts.up.weight, parts.up.bias)
        ctx.parts = parts
        ctx.save_for_backward(tokens, *first, qkv, attended, logsumexp, middle, *second, inner)
        return linear(_activate(parts.activation)(inner), parts.down.weight, parts.down.bias).add_(middle).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts: _Parts = ctx.parts
        tokens, mean, scale, qkv, attended, logsumexp, *kept = ctx.saved_tensors
        batch, length, width = grad.shape
        q, k, v = qkv.chunk(3, dim=-1)
        grad = grad.flatten(0, 1)
        if alone := _is_of_first_tokens(grad, batch):
            # Contiguous: a layer norm's way back reads its means without their strides.
            q, grad, attended, *kept = (_first(tensor, batch).contiguous() for tensor in (q, grad, attended, *kept))
            logsumexp = logsumexp[:, :, :1]
        middle, *second, inner = kept
        back = _activate_back(parts.activation)(linear_back(grad, parts.down.weight), inner)
        back = layer_norm_back(parts.norm2, linear_back(back, parts.up.weight), middle, *second).add_(grad)
        given = linear_back(back, parts.out.weight), q, k, v, attended, logsumexp
        to_q, to_k, to_v = attend_back(*given, parts.heads, batch)
        of_q, of_k, of_v = parts.qkv[0].chunk(3)
        to_tokens = linear_back(to_v, of_v, linear_back(to_k, of_k))
        (_first(to_tokens, batch) if alone else to_tokens).add_(linear_back(to_q, of_q))
        to_tokens = layer_norm_back(parts.norm1, to_tokens, tokens, mean, scale)
        (_first(to_tokens, batch) if alone else to_tokens).add_(back)
        return to_tokens.view(batch, length, width), None


def _is_of_first_tokens(grad: Tensor, batch: int) -> bool:
    """Whether a gradient, (B * T, C), is that of each image's first token alone, as the class token's of the last layer."""
    return len(grad) > batch and not bool(grad.view(batch, -1, grad.shape[-1])[:, 1:].any())


def _first(tokens: Tensor, batch: int) -> Tensor:
    """(B * T, X) -> (B, X): each image's first token; a view."""
    return tokens.view(batch, -1, tokens.shape[-1])[:, 0]


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
