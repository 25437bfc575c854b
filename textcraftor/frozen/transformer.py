"""The UNet's transformer: self-attention, attention to the prompt, gated MLP; from feature map to feature map."""

import weakref
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from textcraftor.frozen.kernels import (
    aten,
    attend,
    attend_back,
    carries_gradient_on_cpu,
    group_norm,
    group_norm_back,
    in_order,
    layer_norm,
    layer_norm_back,
    linear,
    linear_back,
    to_images,
    to_tokens,
)


class FrozenTransformer2DModel(Transformer2DModel):
    """One node of the graph, in channels-last order. Gradient goes to the feature map and to the prompt's embeddings."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        asked_for_more = any(value is not None for value in (*args, *kwargs.values()))
        if asked_for_more or encoder_hidden_states is None or not (self._is_plain and carries_gradient_on_cpu(self)):
            own = super().forward
            return own(hidden_states, encoder_hidden_states, *args, return_dict=return_dict, **kwargs)
        out = cast(Tensor, _Transformer.apply(hidden_states, encoder_hidden_states, self))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    @property
    def _is_plain(self) -> bool:
        """As Stable Diffusion's are."""
        return self.is_input_continuous and all(map(_is_plain_block, self.transformer_blocks))


def _is_plain_block(block: Any) -> bool:
    if type(block) is not BasicTransformerBlock or block.norm_type != "layer_norm" or block.only_cross_attention:
        return False
    gated = isinstance(block.ff.net[0], GEGLU) and not (block.training and block.ff.net[1].p)
    return gated and block.pos_embed is None and block.attn2 is not None and all(map(_is_plain_attention, _attentions(block)))


def _is_plain_attention(attn: Any) -> bool:
    nothing = (attn.norm_q, attn.norm_k, attn.norm_cross, attn.group_norm, attn.spatial_norm)
    linears = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    return (
        type(attn.processor) is AttnProcessor2_0
        and not any(nothing)
        and all(isinstance(layer, nn.Linear) for layer in linears)
        and not (attn.residual_connection or (attn.training and attn.to_out[1].p))
        and attn.rescale_output_factor == 1
    )


def _attentions(block: Any) -> tuple[Any, Any]:
    return block.attn1, block.attn2


class _Kept(NamedTuple):
    """What one block keeps for the way back. What norms and projections made of it is computed again."""

    tokens: Tensor
    attended: Tensor
    logsumexp: Tensor
    cross_k: Tensor
    cross_v: Tensor
    cross_attended: Tensor
    cross_logsumexp: Tensor


class _Transformer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, prompt_embeds: Tensor, model: Any) -> Tensor:
        images = in_order(images)
        normed, *norm = group_norm(model.norm, images)
        tokens, kept = _project(model.proj_in, to_tokens(normed)), list[Tensor]()
        for block in model.transformer_blocks:
            tokens, of_block = _forward(block, tokens, prompt_embeds)
            kept += of_block
        ctx.model = model
        ctx.save_for_backward(images, *norm, *kept)
        return to_images(_project(model.proj_out, tokens), images).add_(images)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        model, (images, mean, scale, *kept) = ctx.model, ctx.saved_tensors
        grad, to_prompt, size = in_order(grad), None, len(_Kept._fields)
        back = linear_back(to_tokens(grad), model.proj_out.weight.flatten(1))
        for index in reversed(range(len(model.transformer_blocks))):
            of_block = _Kept(*kept[index * size : (index + 1) * size])
            goes_on = index > 0 or ctx.needs_input_grad[0]
            back, more = _backward(model.transformer_blocks[index], back, of_block, goes_on)
            to_prompt = more if to_prompt is None else to_prompt.add_(more)
        if not ctx.needs_input_grad[0]:
            return None, to_prompt, None
        back = to_images(linear_back(back, model.proj_in.weight.flatten(1)), grad)
        return group_norm_back(model.norm, back, images, mean, scale).add_(grad), to_prompt, None


def _forward(block: Any, tokens: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, _Kept]:
    attn, cross = block.attn1, block.attn2
    q, k, v = _own(attn, layer_norm(block.norm1, tokens)[0])
    attended, logsumexp = attend(q, k, v, attn.heads)
    after_self = _project(attn.to_out[0], attended).add_(tokens)

    cross_q = _project(cross.to_q, layer_norm(block.norm2, after_self)[0])
    cross_k, cross_v = _of_prompt(cross, prompt_embeds)
    cross_attended, cross_logsumexp = attend(cross_q, cross_k, cross_v, cross.heads)
    after_cross = _project(cross.to_out[0], cross_attended).add_(after_self)

    hidden, gate = _gated(block, layer_norm(block.norm3, after_cross)[0])
    out = _project(block.ff.net[2], F.gelu(gate).mul_(hidden)).add_(after_cross)
    return out, _Kept(tokens, attended, logsumexp, cross_k, cross_v, cross_attended, cross_logsumexp)


def _backward(block: Any, grad: Tensor, kept: _Kept, goes_on: bool) -> tuple[Tensor, Tensor]:
    """The gradients to the block's tokens (where it goes on from there) and to the prompt's embeddings."""
    attn, cross = block.attn1, block.attn2
    after_self = _project(attn.to_out[0], kept.attended).add_(kept.tokens)
    after_cross = _project(cross.to_out[0], kept.cross_attended).add_(after_self)
    normed, mean, scale = layer_norm(block.norm3, after_cross)
    hidden, gate = _gated(block, normed)
    back = linear_back(grad, block.ff.net[2].weight)
    to_hidden, to_gate = back * F.gelu(gate), aten.gelu_backward(back.mul_(hidden), gate)
    (of_hidden, _), (of_gate, _) = _halves(block.ff.net[0].proj)
    back = linear_back(to_gate, of_gate).add_(linear_back(to_hidden, of_hidden))
    grad = layer_norm_back(block.norm3, back, after_cross, mean, scale).add_(grad)

    normed, mean, scale = layer_norm(block.norm2, after_self)
    crossed = (_project(cross.to_q, normed), kept.cross_k, kept.cross_v, kept.cross_attended, kept.cross_logsumexp)
    to_q, to_k, to_v = attend_back(linear_back(grad, cross.to_out[0].weight), *crossed, cross.heads)
    to_prompt = linear_back(to_k, cross.to_k.weight).add_(linear_back(to_v, cross.to_v.weight))
    back = linear_back(to_q, cross.to_q.weight)
    grad = layer_norm_back(block.norm2, back, after_self, mean, scale).add_(grad)
    if not goes_on:
        return grad, to_prompt

    normed, mean, scale = layer_norm(block.norm1, kept.tokens)
    own = (*_own(attn, normed), kept.attended, kept.logsumexp)
    to_q, to_k, to_v = attend_back(linear_back(grad, attn.to_out[0].weight), *own, attn.heads)
    back = linear_back(to_q, attn.to_q.weight)
    back = back.add_(linear_back(to_k, attn.to_k.weight)).add_(linear_back(to_v, attn.to_v.weight))
    return layer_norm_back(block.norm1, back, kept.tokens, mean, scale).add_(grad), to_prompt


def _own(attn: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention's queries, keys and values."""
    return cast(Any, tuple(_project(layer, normed) for layer in (attn.to_q, attn.to_k, attn.to_v)))


def _gated(block: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
    """What is gated, and the gate before its GELU.

    Two products rather than one that is cut in two: GELU of a strided half is many times slower on a CPU.
    """
    return cast(Any, tuple(linear(normed, weight, bias) for weight, bias in _halves(block.ff.net[0].proj)))


def _of_prompt(attn: Any, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompt: the same at every step of a chain, so they are computed at its first and shared."""
    state = (prompt_embeds._version, attn.to_k.weight._version, attn.to_v.weight._version)
    of, seen, keys = attn.__dict__.get("_of_prompt", (None, None, None))
    if of is None or of() is not prompt_embeds or seen != state:
        keys = tuple(_project(layer, prompt_embeds) for layer in (attn.to_k, attn.to_v))
        attn.__dict__["_of_prompt"] = (weakref.ref(prompt_embeds), state, keys)
    return cast(Any, keys)


def _project(layer: Any, tokens: Tensor) -> Tensor:
    """By a linear layer, or a convolution of 1 x 1."""
    return linear(tokens, layer.weight.flatten(1), layer.bias)


def _halves(layer: nn.Linear) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True))
