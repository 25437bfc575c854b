"""The image-text models of the recipe, in the two formats that rewards come in, with one interface for training."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from textcraftor.tiny.recipe.tokenizer import CONTEXT_LENGTH

IMAGE_SIZE = 64
EMBEDDING = 128
MEAN, STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
VISION: dict[str, Any] = {"layers": 5, "width": 128, "head_width": 32, "patch_size": 8, "mlp_ratio": 2.0}
TEXT: dict[str, Any] = {"layers": 3, "width": 96, "heads": 4, "mlp_ratio": 2.0}
# The held-out judge has another architecture: convolutions with attention pooling, as CLIP's RN50.
HELDOUT_VISION: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 12, "head_width": 32}
HELDOUT_TEXT: dict[str, Any] = {"layers": 4, "width": 64, "heads": 2, "mlp_ratio": 4.0}


class Towers(nn.Module):
    """An image tower and a text tower with one embedding space.  Embeddings are not normalised."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings, (B, 128).  pixels: (B, 3, 64, 64), from `normalize`."""
        raise NotImplementedError

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings, (B, 128).  ids: (B, 40), from `tokenize`."""
        raise NotImplementedError


def normalize(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) images in [0, 1], normalised with CLIP's channel means and standard deviations."""
    normalized: Tensor = TF.normalize(images, MEAN, STD)
    return normalized


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Token ids, (B, 40), padded with the end token and truncated to the context length."""
    ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(device)


def open_clip_config(tokenizer: CLIPTokenizer, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The `model_cfg` of open_clip_config.json."""
    vision_cfg = {"image_size": IMAGE_SIZE, **vision}
    text_cfg = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "local",  # any name: open_clip loads the tokenizer in the weights' folder
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        **text,
    }
    return {"embed_dim": EMBEDDING, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def new_open_clip(tokenizer: CLIPTokenizer, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> CLIP:
    """An untrained open_clip model."""
    return CLIP(**open_clip_config(tokenizer, vision, text))


def new_clip_model(tokenizer: CLIPTokenizer, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> CLIPModel:
    """An untrained transformers `CLIPModel` of the same size."""
    config = CLIPConfig(
        text_config=text_config(tokenizer, text, projection=EMBEDDING).to_dict(),
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": IMAGE_SIZE,
            "patch_size": vision["patch_size"],
            "projection_dim": EMBEDDING,
            "hidden_act": "gelu",
        },
        projection_dim=EMBEDDING,
    )
    return CLIPModel(config)


# From open_clip's parameter names to those of transformers' CLIPModel; each rule is applied to the result of the one before.
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^transformer\.", "text_model.encoder."),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.", "vision_model.encoder."),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"\.resblocks\.", ".layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def to_clip_model(model: CLIP, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An open_clip model of `new_open_clip` as a transformers `CLIPModel` with the same embeddings."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:  # queries, keys and values, one below the other
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:  # open_clip multiplies by its projections from the right
            renamed[name] = tensor.T if name in ("text_projection.weight", "visual_projection.weight") else tensor
    converted = new_clip_model(tokenizer)
    converted.load_state_dict(renamed)
    return converted


def text_config(tokenizer: CLIPTokenizer, text: dict[str, Any], projection: int) -> CLIPTextConfig:
    """Configuration of a transformers CLIP text encoder.  text: open_clip's `text_cfg`.  projection: width of its output."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text["width"],
        intermediate_size=int(text["width"] * text["mlp_ratio"]),
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=projection,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class OpenClipTowers(Towers):
    """An open_clip model as `Towers`."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)
        return features


class HuggingFaceTowers(Towers):
    """A transformers `CLIPModel` as `Towers`."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.get_text_features(ids).pooler_output
        return features


class TextEncoderTowers(Towers):
    """A text encoder with a projection and the image tower of `clip`, both discarded after training."""

    def __init__(self, text_encoder: CLIPTextModel, clip: CLIP) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.projection = nn.Linear(text_encoder.config.hidden_size, EMBEDDING, bias=False)
        self.image_tower = clip.visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.image_tower(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.projection(self.text_encoder(ids).pooler_output)
        return features


def cosine(towers: Towers, images: Tensor, ids: Tensor) -> Tensor:
    """Cosine similarity of each image with its own prompt, (B,).  images: (B, 3, 64, 64) in [0, 1].  ids: (B, 40)."""
    image_features = towers.encode_image(normalize(images)).float()
    text_features = towers.encode_text(ids).float()
    return F.cosine_similarity(image_features, text_features)
