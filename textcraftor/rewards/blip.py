"""BLIP as ImageReward uses it: an image tower, and a BERT with cross-attention to the image.

The modules are those of transformers (BlipVisionModel, BlipTextModel). This module maps the published file's tensor names
to theirs and derives the architecture from the tensors' shapes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from textcraftor.errors import ModelError
from textcraftor.models.weights import check_fit, require_matching_keys

IMAGE, TEXT = "blip.visual_encoder.", "blip.text_encoder."
POSITIONS, PATCHES = f"{IMAGE}pos_embed", f"{IMAGE}patch_embed.proj.weight"
# Tensors of the file that no score depends on: BLIP's contrastive projections, and a buffer of position ids.
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
HEAD_WIDTH = 64  # channels of an attention head, in every image tower of BLIP
# Tensor names of the image tower: (transformers, ImageReward's file)
NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    ("post_layernorm.", "norm."),
)


class Blip(nn.Module):
    """The two towers.  image: (B, 3, S, S) -> (B, patches + 1, D).  text: token ids, with cross-attention to the former."""

    def __init__(self, image: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.image: Any = BlipVisionModel(image)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)


def load_blip(state: Mapping[str, Tensor], path: Path, med_config: Path) -> Blip:
    """BLIP with the tensors `blip.*` of ImageReward's file; never loads a part of them.

    state: the file's tensors.  path: the file, for messages.  med_config: JSON file of the text encoder's configuration.
    Raises ModelError naming the file and the missing, unexpected or mismatched keys.
    """
    ours = {key: value for key, value in state.items() if key.startswith("blip.") and not UNUSED.fullmatch(key)}
    require_matching_keys(path, "ImageReward", missing={POSITIONS, PATCHES} - ours.keys())
    image = _image_config(ours, path)
    model = Blip(image, _text_config(med_config, image.hidden_size))
    expected = {file_key(key): key for key in model.state_dict()}
    check_fit(path, "ImageReward", ours, {ours_key: model.state_dict()[key] for ours_key, key in expected.items()})
    model.load_state_dict({key: ours[ours_key] for ours_key, key in expected.items()})
    return model


def file_key(key: str) -> str:
    """The name in ImageReward's file of a tensor of `Blip`.  The text tower's names differ in the prefix only."""
    tower, _, name = key.partition(".")
    if tower == "text":
        return TEXT + name
    for from_transformers, in_file in NAMES:
        name = name.replace(from_transformers, in_file)
    return IMAGE + name


def _image_config(state: Mapping[str, Tensor], path: Path) -> BlipVisionConfig:
    """Configuration of the image tower, from the tensors' shapes.  Published: ViT-L/16 at 224 px."""
    positions, patches = state[POSITIONS], state[PATCHES]
    side = round((positions.shape[1] - 1) ** 0.5) if positions.ndim == 3 else 0
    width = positions.shape[-1]
    if side < 1 or side * side + 1 != positions.shape[1] or patches.ndim != 4 or width % HEAD_WIDTH:
        raise ModelError(
            f"{path}: {POSITIONS} {tuple(positions.shape)} and {PATCHES} {tuple(patches.shape)} describe no image tower "
            f"of BLIP (a class token and a square of patches, a width that is a multiple of {HEAD_WIDTH})"
        )
    blocks = {match[1] for key in state if (match := re.match(rf"{re.escape(IMAGE)}blocks\.(\d+)\.", key))}
    hidden = state.get(f"{IMAGE}blocks.0.mlp.fc1.bias")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width if hidden is None else len(hidden),
        num_hidden_layers=len(blocks),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,  # as in the published model; transformers' default differs
    )


def _text_config(path: Path, encoder_width: int) -> BlipTextConfig:
    """Configuration of the text encoder, from med_config.json.  Published: BERT-base with 30,524 tokens."""
    wants = "the configuration of ImageReward's text encoder (med_config.json, published beside ImageReward.pt)"
    try:
        med = json.loads(path.read_text(encoding="utf-8"))
        return BlipTextConfig(
            vocab_size=med["vocab_size"],
            hidden_size=med["hidden_size"],
            encoder_hidden_size=encoder_width,
            intermediate_size=med["intermediate_size"],
            num_hidden_layers=med["num_hidden_layers"],
            num_attention_heads=med["num_attention_heads"],
            max_position_embeddings=med["max_position_embeddings"],
            hidden_act=med["hidden_act"],
            layer_norm_eps=med["layer_norm_eps"],
            pad_token_id=med["pad_token_id"],
            is_decoder=True,  # adds cross-attention; self-attention stays bidirectional
        )
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; expected {wants}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read; expected {wants}: {' '.join(str(error).split())[:200]}") from None
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}; expected {wants}") from None
