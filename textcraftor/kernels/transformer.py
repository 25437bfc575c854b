"""The UNet's transformer: self-attention, attention to the prompt, gated MLP; from feature map to feature map."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from textcraftor.kernels.operators import (
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
    stacked,
    to_images,
    to_tokens,
)
from textcraftor.kernels.twins import shared_half, summed


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
        keys = [key for block in self.transformer_blocks for key in _of_prompt(block.attn2, encoder_hidden_states)]
        out = cast(Tensor, _Transformer.apply(shared_half(hidden_states), self, *keys))
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
    cross_attended: Tensor
    cross_logsumexp: Tensor


class _Transformer(torch.autograd.Function):
    """Of B images and B prompts, or of the same B images for the 2B of guidance: then all before the prompt is computed once.

    Tokens are (rows, C) in here: products of matrices, without the views that more dimensions cost.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Any, *keys: Tensor) -> Tensor:
        images, batch = in_order(images), len(keys[0])
        pixels = images.shape[2] * images.shape[3]
        normed, *norm = group_norm(model.norm, images)
        tokens, kept = _project(model.proj_in, to_tokens(normed)), list[Tensor]()
        for block, key in zip(model.transformer_blocks, _pairs(keys), strict=True):
            tokens, of_block = _forward(block, tokens, batch, len(tokens) // pixels, key)
            kept += of_block
        ctx.model = model
        ctx.save_for_backward(images, *norm, *keys, *kept)
        out = to_images(_project(model.proj_out, tokens), images)
        for half in out.split(len(images)):
            half.add_(images)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        model, (images, mean, scale, *kept) = ctx.model, ctx.saved_tensors
        blocks, to_keys, size = model.transformer_blocks, list[Tensor](), len(_Kept._fields)
        keys, kept = _pairs(kept[: 2 * len(blocks)]), kept[2 * len(blocks) :]
        grad, batch = in_order(grad), len(grad)
        back = linear_back(to_tokens(grad), model.proj_out.weight.flatten(1))
        for index in reversed(range(len(blocks))):
            of_block = _Kept(*kept[index * size : (index + 1) * size])
            goes_on = index > 0 or ctx.needs_input_grad[0]
            back, to_key = _backward(blocks[index], back, batch, of_block, keys[index], goes_on)
            to_keys = [*to_key, *to_keys]
        if not ctx.needs_input_grad[0]:
            return None, None, *to_keys
        back = to_images(linear_back(back, model.proj_in.weight.flatten(1)), images)
        return group_norm_back(model.norm, back, images, mean, scale).add_(summed(grad, len(images))), None, *to_keys


def _forward(block: Any, tokens: Tensor, batch: int, own: int, key: tuple[Tensor, Tensor]) -> tuple[Tensor, _Kept]:
    """Tokens of `own` images; from the attention to the prompts on, of `batch`."""
    attn, cross = block.attn1, block.attn2
    q, k, v = _own(attn, layer_norm(block.norm1, tokens)[0])
    attended, logsumexp = attend(q, k, v, attn.heads, own)
    after_self = _after_self(attn, attended, tokens, batch // own)

    cross_q = _project(cross.to_q, layer_norm(block.norm2, after_self)[0])
    cross_attended, cross_logsumexp = attend(cross_q, *key, cross.heads, batch)
    after_cross = _project(cross.to_out[0], cross_attended).add_(after_self)

    up, _, down = block.ff.net
    (of_hidden, hidden_bias), (of_gate, gate_bias) = _halves(up.proj)
    normed = layer_norm(block.norm3, after_cross)[0]
    gated = aten.gelu_(linear(normed, of_gate, gate_bias)).mul_(linear(normed, of_hidden, hidden_bias))
    out = _project(down, gated).add_(after_cross)
    return out, _Kept(tokens, attended, logsumexp, cross_attended, cross_logsumexp)


def _backward(
    block: Any, grad: Tensor, batch: int, kept: _Kept, key: tuple[Tensor, Tensor], goes_on: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradients to the block's tokens (where it goes on from there) and to the prompts' keys and values."""
    attn, cross, own = block.attn1, block.attn2, len(kept.logsumexp)
    after_self = _after_self(attn, kept.attended, kept.tokens, batch // own)
    after_cross = _project(cross.to_out[0], kept.cross_attended).add_(after_self)
    normed, mean, scale = layer_norm(block.norm3, after_cross)
    # Two products rather than one that is cut in two: GELU of a strided half is many times slower on a CPU.
    up, _, down = block.ff.net
    (of_hidden, hidden_bias), (of_gate, gate_bias) = _halves(up.proj)
    hidden, gate = linear(normed, of_hidden, hidden_bias), linear(normed, of_gate, gate_bias)
    back = linear_back(grad, down.weight)
    to_gate = aten.gelu_backward.grad_input(hidden.mul_(back), gate, grad_input=hidden)
    to_hidden = aten.gelu_(gate).mul_(back)
    back = linear_back(to_hidden, of_hidden, linear_back(to_gate, of_gate))
    grad = layer_norm_back(block.norm3, back, after_cross, mean, scale).add_(grad)

    normed, mean, scale = layer_norm(block.norm2, after_self)
    crossed = (_project(cross.to_q, normed), *key, kept.cross_attended, kept.cross_logsumexp)
    to_q, to_k, to_v = attend_back(linear_back(grad, cross.to_out[0].weight), *crossed, cross.heads, batch)
    to_key = to_k.view_as(key[0]), to_v.view_as(key[1])
    back = linear_back(to_q, cross.to_q.weight)
    grad = layer_norm_back(block.norm2, back, after_self, mean, scale).add_(grad)
    if not goes_on:
        return grad, to_key

    grad = summed(grad, len(kept.tokens))
    normed, mean, scale = layer_norm(block.norm1, kept.tokens)
    attended = (*_own(attn, normed), kept.attended, kept.logsumexp)
    to_q, to_k, to_v = attend_back(linear_back(grad, attn.to_out[0].weight), *attended, attn.heads, own)
    back = linear_back(to_q, attn.to_q.weight)
    back = linear_back(to_v, attn.to_v.weight, linear_back(to_k, attn.to_k.weight, back))
    return layer_norm_back(block.norm1, back, kept.tokens, mean, scale).add_(grad), to_key


def _own(attn: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention's queries, keys and values."""
    return cast(Any, linear(normed, *stacked(attn.to_q, attn.to_k, attn.to_v)).chunk(3, dim=-1))


def _after_self(attn: Any, attended: Tensor, tokens: Tensor, times: int) -> Tensor:
    """What the attention to the prompts begins with: the same tokens for each of them."""
    out = _project(attn.to_out[0], attended).add_(tokens)
    return out if times == 1 else out.repeat(times, 1)


def _of_prompt(attn: Any, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompts: the same at every step of a chain, so they are computed at its first and shared."""
    versions = (prompt_embeds._version, attn.to_k.weight._version, attn.to_v.weight._version)
    state = (*versions, prompt_embeds.requires_grad)  # keys without a graph would send none
    of, seen, keys = attn.__dict__.get("_of_prompt", (None, None, None))
    if of is None or of() is not prompt_embeds or seen != state:
        keys = (attn.to_k(prompt_embeds), attn.to_v(prompt_embeds))
        attn.__dict__["_of_prompt"] = (weakref.ref(prompt_embeds), state, keys)
    return cast(Any, keys)


def _pairs(keys: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(keys[::2], keys[1::2], strict=True))


def _project(layer: Any, tokens: Tensor) -> Tensor:
    """By a linear layer, or a convolution of 1 x 1."""
    return linear(tokens, layer.weight.flatten(1), layer.bias)


def _halves(layer: nn.Linear) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True))
