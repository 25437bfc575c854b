"""Selective gradient checkpointing of a diffusers UNet or VAE: fewer saved activations, same outputs and gradients.

autograd saves the input of every norm, activation function, convolution and attention for the backward pass. Here a
residual block saves only the inputs of its two norms, a transformer block those of its three sublayers, and an upsampler
the small image. The backward pass recomputes the rest from them: norms, activation functions, projections, attention.
`torch.utils.checkpoint` stops recomputing once it has what the backward pass needs, which is before the convolution at
the end of a checkpointed part, so no 3 x 3 convolution runs twice.

It works on any device and dtype, under autocast, for frozen and trained modules, and inside full gradient checkpointing.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def enable_selective_checkpointing(model: nn.Module) -> None:
    """Checkpoint parts of each residual block, transformer block and upsampler in `model`, where gradient is enabled.

    Sets `forward` on these module instances, as accelerate's hooks do; names of weights and classes stay.
    """
    for module in model.modules():
        if (forward := FORWARDS.get(type(module))) is not None:
            cast(Any, module).forward = functools.partial(forward, module)


def disable_selective_checkpointing(model: nn.Module) -> None:
    """Give the modules their own `forward` back."""
    for module in model.modules():
        if type(module) in FORWARDS:
            vars(module).pop("forward", None)


def _resnet_forward(block: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`ResnetBlock2D.forward` for the blocks of Stable Diffusion's UNet and VAE; the library's own for other kinds."""
    scales_or_shifts = block.time_embedding_norm == "scale_shift" or block.skip_time_act
    if not torch.is_grad_enabled() or scales_or_shifts or block.upsample is not None or block.downsample is not None:
        return cast(Tensor, ResnetBlock2D.forward(block, input_tensor, temb, *args, **kwargs))
    hidden = _recomputed(block, lambda hidden: block.conv1(block.nonlinearity(block.norm1(hidden))), input_tensor)
    if block.time_emb_proj is not None and temb is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = _recomputed(block, lambda hidden: block.conv2(block.dropout(block.nonlinearity(block.norm2(hidden)))), hidden)
    shortcut = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)
    return (shortcut + hidden) / block.output_scale_factor


def _transformer_forward(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`BasicTransformerBlock.forward` for the blocks of Stable Diffusion's UNet; the library's own for other kinds."""
    is_plain = block.norm_type == "layer_norm" and block.pos_embed is None and block.attn2 is not None
    is_plain = is_plain and not block.only_cross_attention and block._chunk_size is None
    if not torch.is_grad_enabled() or not is_plain or any(value is not None for value in kwargs.values()):
        masks = (attention_mask, encoder_hidden_states, encoder_attention_mask)
        return cast(Tensor, BasicTransformerBlock.forward(block, hidden_states, *masks, **kwargs))
    hidden = hidden_states
    hidden = _recomputed(block, lambda hidden: block.attn1(block.norm1(hidden), attention_mask=attention_mask), hidden) + hidden
    cross_attention = functools.partial(_cross_attention, block, encoder_attention_mask)
    hidden = _recomputed(block, cross_attention, hidden, encoder_hidden_states) + hidden
    return _recomputed(block, lambda hidden: block.ff(block.norm3(hidden)), hidden) + hidden


def _cross_attention(block: Any, mask: Tensor | None, hidden: Tensor, prompt_embeds: Tensor | None) -> Tensor:
    return cast(Tensor, block.attn2(block.norm2(hidden), encoder_hidden_states=prompt_embeds, attention_mask=mask))


def _upsample_forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Upsample2D.forward`, checkpointed: the enlarged image, the convolution's input, is computed again."""
    return _recomputed(block, functools.partial(Upsample2D.forward, block), hidden_states, *args, **kwargs)


def _recomputed(block: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Call a part of `block` and save only its arguments. Random numbers matter only to the dropout of a training block."""
    return cast(Tensor, checkpoint(function, *args, use_reentrant=False, preserve_rng_state=block.training, **kwargs))


FORWARDS: dict[type, Callable[..., Tensor]] = {
    ResnetBlock2D: _resnet_forward,
    BasicTransformerBlock: _transformer_forward,
    Upsample2D: _upsample_forward,
}
