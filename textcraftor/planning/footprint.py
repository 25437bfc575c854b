"""The cost of a model, from shapes alone: parameters, FLOP and saved activations. No weights are needed.

Modules are built on torch's meta device from their config.json or, before that is fetched, from the published architecture,
and run once without data. Attention is counted as in fused kernels, which save no attention matrix.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from textcraftor.config import Config
from textcraftor.models.lora import TARGETS
from textcraftor.planning.architectures import base_architecture, tower_architecture

TOKENS: Final = 77
P = ParamSpec("P")


@dataclass(frozen=True)
class Cost:
    """The cost of one module for one sample.

    flops: FLOP of a forward pass.  saved: bytes of activations saved for the backward pass to the inputs.
    kept, recomputed: with gradient checkpointing by blocks, the bytes saved throughout and those of the largest block while
    it is recomputed; 0 for a module without such blocks.
    embedding: size of a text encoder's output for one prompt.  lora_sides: sum of the input and output widths of the layers
    that a low-rank update would change; times the rank, the parameters of the update.
    """

    parameters: int
    flops: float
    saved: float
    dtype: torch.dtype
    kept: float = 0.0
    recomputed: float = 0.0
    embedding: int = 0
    lora_sides: int = 0

    @property
    def weights(self) -> float:
        """Bytes of the frozen weights."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True)
class Footprint:
    """The costs of all models in a training step.

    unet: for one guided pair, the empty prompt and the prompt.  text_encoders: by their names in the pipeline.
    unknown: rewards of unknown architecture, which are not counted.
    """

    unet: Cost
    vae: Cost
    text_encoders: dict[str, Cost]
    towers: dict[str, Cost]
    unknown: tuple[str, ...]


def _measured_once(
    measure: Callable[Concatenate[Mapping[str, Any], P], Cost],
) -> Callable[Concatenate[Mapping[str, Any], P], Cost]:
    """Measure equal architectures once in a process: rewards share their towers', and plans differ in other settings."""
    found: dict[str, Cost] = {}

    @functools.wraps(measure)
    def cost(architecture: Mapping[str, Any], /, *arguments: P.args, **options: P.kwargs) -> Cost:
        key = json.dumps([architecture, arguments, options], sort_keys=True, default=str)
        if key not in found:
            found[key] = measure(architecture, *arguments, **options)
        return found[key]

    return cost


def footprint(config: Config, root: Path, rewards: list[str]) -> Footprint | None:
    """The costs of the base and of these rewards; None when the base's architecture is unknown."""
    parts = base_architecture(config, root)
    if parts is None:
        return None
    dtype: torch.dtype = getattr(torch, config.base.dtype)
    towers = {name: tower_architecture(config.rewards[name], root) for name in rewards}
    known = {
        name: tower_cost(arch, getattr(torch, config.train.reward_dtype or config.rewards[name].dtype or "float32"))
        for name, arch in towers.items()
        if arch is not None
    }
    encoders = {name: text_cost(part) for name, part in parts.items() if name.startswith("text_encoder")}
    unknown = tuple(name for name, arch in towers.items() if arch is None)
    latents = config.base.resolution // 2 ** (len(parts["vae"]["block_out_channels"]) - 1)
    return Footprint(unet_cost(parts["unet"], latents, dtype), vae_cost(parts["vae"], latents, dtype), encoders, known, unknown)


@_measured_once
def unet_cost(architecture: Mapping[str, Any], latents: int, dtype: torch.dtype) -> Cost:
    """Cost of one guided pair: two rows through the UNet, with gradient to the prompt's embedding and the latents."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**architecture, "sample_size": latents})
        nn.Module.to(unet, dtype)  # skips diffusers' own `to` and its warnings
        shape = (2, unet.config.in_channels, latents, latents)
        noisy = torch.empty(shape, dtype=dtype, requires_grad=True)
        embeds = torch.empty(2, TOKENS, unet.config.cross_attention_dim, dtype=dtype, requires_grad=True)
        more = {}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            ids = torch.empty(2, 6, dtype=dtype)
            more["added_cond_kwargs"] = {"text_embeds": torch.empty(2, pooled, dtype=dtype), "time_ids": ids}
        timestep = torch.empty((), dtype=torch.int64)
        return _measure(unet, dtype, lambda: unet(noisy, timestep, encoder_hidden_states=embeds, **more).sample)


@_measured_once
def vae_cost(architecture: Mapping[str, Any], latents: int, dtype: torch.dtype) -> Cost:
    """Cost of decoding one image. `parameters` counts the whole autoencoder; diffusers checkpoints the blocks."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(architecture))
        nn.Module.to(vae, dtype)
        latent = torch.empty(1, vae.config.latent_channels, latents, latents, dtype=dtype, requires_grad=True)
        blocks = (vae.decoder.mid_block, *vae.decoder.up_blocks)
        return _measure(vae, dtype, lambda: vae.decode(latent).sample, blocks=blocks)


@_measured_once
def text_cost(architecture: Mapping[str, Any]) -> Cost:
    """Cost of one prompt through a CLIP text encoder that is trained in float32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{key: value for key, value in architecture.items() if key not in ("architectures", "model_type")})
    projects = "CLIPTextModelWithProjection" in architecture.get("architectures", []) or config.hidden_size == 1280
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(config)
        tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)
        cost = _measure(encoder, torch.float32, lambda: encoder(tokens)[0], trained=True)
    targets = [module for name, module in encoder.named_modules() if name.rpartition(".")[2] in TARGETS]
    sides = sum(module.in_features + module.out_features for module in targets if isinstance(module, nn.Linear))
    return replace(cost, embedding=config.max_position_embeddings * config.hidden_size, lora_sides=sides)


@_measured_once
def tower_cost(architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Cost:
    """Cost of one image through an image tower, with gradient to the image."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**architecture)
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(config).to(dtype)
        image = torch.empty(1, 3, config.image_size, config.image_size, dtype=dtype, requires_grad=True)
        return _measure(tower, dtype, lambda: tower(image).image_embeds)


def _measure(
    module: nn.Module,
    dtype: torch.dtype,
    forward: Callable[[], Tensor],
    trained: bool = False,
    blocks: Sequence[nn.Module] = (),
) -> Cost:
    """Run `forward` once and count. blocks: the blocks that gradient checkpointing would recompute, in order."""
    module.eval().requires_grad_(trained)
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, tuple[Tensor, int | None]] = {}  # by storage: a tensor that several operations save counts once
    inputs: dict[int, Tensor] = {}
    running: list[int | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, (tensor, running[0]))
        return tensor

    def enter(number: int, hidden: tuple[Any, ...]) -> None:
        running[0] = number
        inputs.setdefault(hidden[0].untyped_storage()._cdata, hidden[0])

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, hidden, number=number: enter(number, hidden))
        block.register_forward_hook(lambda *_: running.__setitem__(0, None))
    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with counter, hooks, _fused_attention():
        forward()
    saved = [(tensor, block) for storage, (tensor, block) in kept.items() if storage not in weights]
    by_block: Counter[int | None] = Counter()
    for tensor, block_number in saved:
        by_block[block_number] += tensor.untyped_storage().nbytes()
    outside = by_block.pop(None, 0) + sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())
    return Cost(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=float(counter.get_total_flops()),
        saved=float(sum(tensor.untyped_storage().nbytes() for tensor, _ in saved)),
        dtype=dtype,
        kept=float(outside) if blocks else 0.0,
        recomputed=float(max(by_block.values(), default=0)),
    )


class _Fused(torch.autograd.Function):
    """Attention that saves query, key, value and output for the backward pass, and no attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query @ key.transpose(-2, -1) @ value
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace torch's attention, which on the meta device would choose the unfused kernel that no GPU uses."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
