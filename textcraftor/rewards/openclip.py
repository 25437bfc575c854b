"""Loads open_clip models strictly and splits them into an image tower and a text tower."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from torch import Tensor, nn

from textcraftor.config import RewardConfig
from textcraftor.errors import ModelError, unknown
from textcraftor.models.weights import check_fit, find_weights, loading, read_tensors
from textcraftor.rewards.base import CosineReward, text_tower_dropped
from textcraftor.rewards.huggingface import count_longer
from textcraftor.rewards.preprocess import Preprocess

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipReward(CosineReward):
    """Cosine of each image with its own prompt under an open_clip model, without its logit scale.

    config.path is one of: a folder that holds open_clip_config.json (or "local-dir:FOLDER"), "hf-hub:OWNER/NAME",
    "ARCHITECTURE:TAG" from open_clip's list, or a checkpoint file if `file_architecture` names its architecture.
    Its version is config.version, by default config.path.
    Raises ModelError if the model is unknown, or weights are missing or do not fit.
    """

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        dtype: torch.dtype = torch.float32,
        file_architecture: str = "",
    ) -> None:
        expected = f"an open_clip model: a folder with {CONFIG}, ARCHITECTURE:TAG or hf-hub:OWNER/NAME"
        expected += f", or a checkpoint file of {file_architecture}" if file_architecture else ""
        with loading(config.path, expected):
            architecture, published, locate_weights = _resolve(config.path, file_architecture, expected)
            model, tokenizer = _load(architecture, published, locate_weights())
            preprocess = _preprocess(model, dtype)
        super().__init__(name, config, dtype, preprocess)
        self.version = config.version or config.path
        self.tokenizer = tokenizer
        # Read before the cast: in half precision the scale would be off by a hundredth.
        self.logit_scale: float = model.logit_scale.detach().exp().item()
        self.image_tower: nn.Module = model.visual.to(dtype)
        del model.visual  # the rest of the model is the text tower
        self.text_tower: Any = model.to(dtype)

    def drop_text_tower(self) -> None:
        """Free the text tower."""
        self.text_tower = None

    def truncated(self, prompts: Sequence[str]) -> int:
        """Number of prompts longer than the context."""
        limit = self.tokenizer.context_length
        hugging_face = getattr(self.tokenizer, "tokenizer", None)
        if hugging_face is not None:
            return count_longer(hugging_face, [self.tokenizer.clean_fn(prompt) for prompt in prompts], limit)
        return sum(len(self.tokenizer.encode(prompt)) + 2 > limit for prompt in prompts)  # + start and end of text

    def _encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.image_tower(pixels)
        return features

    def _encode_text(self, prompts: list[str]) -> Tensor:
        if self.text_tower is None:
            raise text_tower_dropped(self.name)
        features: Tensor = self.text_tower.encode_text(self.tokenizer(prompts).to(self.device))
        return features


def _resolve(path: str, file_architecture: str, expected: str) -> tuple[str, Mapping[str, Any], Callable[[], Path]]:
    """open_clip's name of the architecture, its settings of the published weights, and a function that locates them.

    expected: what `path` should be, for messages.  Raises ModelError.
    """
    folder = Path(path.removeprefix("local-dir:"))
    if (folder / CONFIG).is_file():
        return f"local-dir:{folder}", {}, lambda: find_weights(folder, WEIGHTS)
    if path and folder.is_dir():
        raise ModelError(f"{folder} holds no {CONFIG}; expected {expected}")
    if file_architecture and folder.is_file():
        return file_architecture, {}, lambda: folder
    if path.startswith("hf-hub:"):
        return path, {}, lambda: Path(download_pretrained_from_hf(path.removeprefix("hf-hub:")))
    architecture, colon, tag = path.partition(":")
    if not colon or architecture == "local-dir" or "/" in architecture:
        raise ModelError(f"{path!r} does not exist; expected {expected}")
    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=5, cutoff=0.0)
        raise ModelError(f"Unknown open_clip architecture {architecture!r}. The nearest: {', '.join(near)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ModelError(unknown(f"pretrained tag of {architecture}", tag, tags))
    published = get_pretrained_cfg(architecture, tag)
    return architecture, published, lambda: Path(download_pretrained(published))


def _load(architecture: str, published: Mapping[str, Any], weights: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer.

    open_clip's own loader is not used: it silently interpolates positional embeddings of another resolution or context
    length.
    """
    model = open_clip.create_model(
        architecture,
        load_weights=False,
        pretrained_text=False,
        force_quick_gelu=published.get("quick_gelu", False),
        force_preprocess_cfg=published,
    )
    if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP):
        raise ModelError(f"{architecture} is a {type(model).__name__}; only CLIP-like models can be a reward")
    state = convert_state_dict(model, read_tensors(weights, f"weights of {architecture}"))
    if isinstance(model, open_clip.CustomTextCLIP):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(model.state_dict()[scalar].shape)
    check_fit(weights, architecture, state, model.state_dict())
    model.load_state_dict(state)
    tokenizer = open_clip.get_tokenizer(architecture)
    _check_end_of_text(architecture, model, tokenizer)
    return model, tokenizer


def _check_end_of_text(architecture: str, model: Any, tokenizer: Any) -> None:
    """Raises ModelError unless the end of text has the greatest token id: open_clip pools at the greatest id."""
    hugging_face = getattr(tokenizer, "tokenizer", None)
    if hugging_face is None or getattr(model, "text_pool_type", "") != "argmax":
        return
    greatest = max(hugging_face.get_vocab().values())
    if hugging_face.eos_token_id != greatest:
        raise ModelError(
            f"{architecture}: the end-of-text token must have the greatest id, {greatest}, where the model "
            f"pools; the tokenizer's is {hugging_face.eos_token_id}. Use the tokenizer it was trained with"
        )


def _preprocess(model: Any, dtype: torch.dtype) -> Preprocess:
    settings = model.visual.preprocess_cfg
    size = settings["size"]
    if not isinstance(size, int):
        height, width = size
        if height != width:
            raise ModelError(f"The image tower takes {height}x{width} px; only square towers can be a reward")
        size = height
    if settings["resize_mode"] == "longest":
        raise ModelError("The image tower pads its input (resize_mode: longest); known: shortest, squash")
    return Preprocess(size, settings["mean"], settings["std"], settings["interpolation"], settings["resize_mode"], dtype)
