"""open_clip models: found, loaded whole, split into an image tower and a text tower."""

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
from textcraftor.models.weights import check_fit, loading, read_tensors
from textcraftor.rewards.base import CosineReward, dropped
from textcraftor.rewards.preprocess import Preprocess

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipReward(CosineReward):
    """cos(image, prompt) under an open_clip model, without its logit scale.

    config.path is one of: a folder that holds open_clip_config.json (or "local-dir:FOLDER"),
    "hf-hub:OWNER/NAME", "ARCHITECTURE:TAG" of open_clip's own list, or a checkpoint file where
    `file_architecture` names its architecture.
    """

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        dtype: torch.dtype,
        file_architecture: str = "",
    ) -> None:
        wants = f"an open_clip model: a folder with {CONFIG}, ARCHITECTURE:TAG or hf-hub:OWNER/NAME"
        wants += f", or a checkpoint file of {file_architecture}" if file_architecture else ""
        with loading(config.path, wants):
            architecture, published, find_weights = _resolve(config.path, file_architecture, wants)
            model, tokenizer = _load(architecture, published, find_weights())
            preprocess = _preprocess_of(model, dtype)
        super().__init__(name, config, dtype, preprocess)
        self.tokenizer = tokenizer
        # Read before the cast: rounded to half precision, the scale would be off by a hundredth.
        self.logit_scale: float = model.logit_scale.detach().exp().item()
        self.image_tower: nn.Module = model.visual.to(dtype)
        del model.visual  # what is left of the model is its text side
        self.text_tower: Any = model.to(dtype)

    def drop_text_tower(self) -> None:
        """Free the text tower."""
        self.text_tower = None

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the context."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            cleaned = [self.tokenizer.clean_fn(prompt) for prompt in prompts]
            lengths = [len(ids) for ids in inner(cleaned, verbose=False).input_ids]
        else:
            lengths = [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]  # start and end of text
        return sum(length > self.tokenizer.context_length for length in lengths)

    def _encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.image_tower(pixels)
        return features

    def _encode_text(self, prompts: list[str]) -> Tensor:
        if self.text_tower is None:
            raise dropped(self.name)
        features: Tensor = self.text_tower.encode_text(self.tokenizer(prompts).to(self.device))
        return features


def _resolve(path: str, file_architecture: str, wants: str) -> tuple[str, Mapping[str, Any], Callable[[], Path]]:
    """open_clip's name of the architecture, its facts on published weights, and how to get at the weights."""
    folder = Path(path.removeprefix("local-dir:"))
    if (folder / CONFIG).is_file():
        return f"local-dir:{folder}", {}, lambda: _weights_in(folder)
    if path and folder.is_dir():
        raise ModelError(f"{folder} holds no {CONFIG}; expected {wants}")
    if file_architecture and folder.is_file():
        return file_architecture, {}, lambda: folder
    if path.startswith("hf-hub:"):
        return path, {}, lambda: Path(download_pretrained_from_hf(path.removeprefix("hf-hub:")))
    architecture, colon, tag = path.partition(":")
    if not colon or architecture == "local-dir" or "/" in architecture:
        raise ModelError(f"{path!r} does not exist; expected {wants}")
    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=5, cutoff=0.0)
        raise ModelError(f"Unknown open_clip architecture {architecture!r}. The nearest: {', '.join(near)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ModelError(unknown(f"pretrained tag of {architecture}", tag, tags))
    published = get_pretrained_cfg(architecture, tag)
    return architecture, published, lambda: Path(download_pretrained(published))


def _load(architecture: str, published: Mapping[str, Any], weights: Path) -> tuple[Any, Any]:
    """The whole model in float32 and its tokenizer.

    Not by open_clip's own loader: that one stretches positional embeddings of another resolution or
    context length to fit, without a word.
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


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} holds no weights; expected one of {', '.join(WEIGHTS)}")


def _check_end_of_text(architecture: str, model: Any, tokenizer: Any) -> None:
    """open_clip reads a prompt's features at its greatest token id, which must be the end of text."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None or getattr(model, "text_pool_type", "") != "argmax":
        return
    greatest = max(inner.get_vocab().values())
    if inner.eos_token_id != greatest:
        raise ModelError(
            f"{architecture}: the end-of-text token must have the greatest id, {greatest}, where the model "
            f"pools; the tokenizer's is {inner.eos_token_id}. Use the tokenizer it was trained with"
        )


def _preprocess_of(model: Any, dtype: torch.dtype) -> Preprocess:
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
