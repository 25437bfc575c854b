"""A diffusers pipeline in its family's original single-file layout, which ComfyUI and the WebUI read.

diffusers converts from this layout (`single_file.py`) and, outside its scripts, not to it. Tests read what is written here
with diffusers' own converters.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def original_tensors(pipe: Any) -> dict[str, Tensor]:
    """The tensors of the file: SD 1.x, 2.x (an OpenCLIP encoder is told by its gelu) and SDXL."""
    tensors = {f"model.diffusion_model.{unet_key(pipe.unet, key)}": value for key, value in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae_tensors(pipe.vae).items()}
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip_tensors(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip_tensors(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        tensors |= open_clip_tensors(pipe.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= clip_tensors(pipe.text_encoder, "cond_stage_model.transformer.text_model.")
    return {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}


def unet_key(unet: Any, key: str) -> str:
    layers, blocks = unet.config.layers_per_block, len(unet.config.block_out_channels)
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return key.replace(ours, theirs, 1)
    where, rest = re.match(r"((?:down_blocks|up_blocks)\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
    side, *numbers = where.split(".")
    if side == "mid_block":
        kind, number = numbers
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{place}.{inner(rest) if kind == 'resnets' else rest}"
    block, kind, number = int(numbers[0]), numbers[1], int(numbers[2])
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attended = "CrossAttn" in unet.config.up_block_types[block]
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attended else 1}.{rest}"
    place = (
        f"input_blocks.{block * (layers + 1) + number + 1}"
        if side == "down_blocks"
        else f"output_blocks.{block * (layers + 1) + number}"
    )
    assert block < blocks
    return f"{place}.0.{inner(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def inner(rest: str) -> str:
    name, tail = rest.rsplit(".", 1)
    return f"{RESNET[name]}.{tail}"


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    tensors = {}
    for key, value in vae.state_dict().items():
        name = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in VAE_ATTENTION.items():
                name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        tensors[name] = value
    return tensors


def clip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    named = {f"{prefix}{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()}
    config: Any = encoder.config
    # The published files hold this buffer too; nobody needs it.
    return {**named, f"{prefix}embeddings.position_ids": torch.arange(config.max_position_embeddings)[None]}


def open_clip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for key, value in state.items():
        if key in ends:
            tensors[prefix + ends[key]] = value
        elif key == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = value.T
        elif match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key):
            layer, name, kind = match.groups()
            place = f"{prefix}transformer.resblocks.{layer}"
            if name == "self_attn.q_proj":
                parts = [state[f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                tensors[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif name == "self_attn.out_proj":
                tensors[f"{place}.attn.out_proj.{kind}"] = value
            elif name in OPEN_CLIP:
                tensors[f"{place}.{OPEN_CLIP[name]}.{kind}"] = value
    if "text_projection.weight" not in state:
        # SD 2.x was cut before its last layer: the file has one more than the encoder, and a projection. Zeros in it leave
        # what comes in as it is.
        last = max(int(key.split("resblocks.")[1].split(".")[0]) for key in tensors if "resblocks." in key)
        cut = {key: value for key, value in tensors.items() if f"resblocks.{last}." in key}
        tensors |= {
            key.replace(f"resblocks.{last}.", f"resblocks.{last + 1}."): torch.zeros_like(value) for key, value in cut.items()
        }
        config: Any = encoder.config
        tensors[f"{prefix}text_projection"] = torch.eye(config.hidden_size)
    return tensors
