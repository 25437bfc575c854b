"""Loads transformers CLIP models strictly, with their preprocessing and tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedModel

from textcraftor.errors import ModelError
from textcraftor.models.weights import loading, local_or_hub, require_matching_keys
from textcraftor.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


def load_model(kind: type[PreTrainedModel], path: str, ignore: tuple[str, ...] = ()) -> Any:
    """A transformers model in float32 from a folder or hub id, safetensors only.

    ignore: prefixes of keys that the checkpoint may hold in addition, such as those of a text tower.
    Raises ModelError if the weights are missing or truncated, or any other key or shape does not fit.
    """
    wants = f"a {kind.__name__} (config.json and model.safetensors)"
    with loading(path, wants):
        source = local_or_hub(path, wants)
        loaded: Any = kind.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below with the names of the tensors
        )
        model, info = loaded
        require_matching_keys(
            f"{path}/model.safetensors",
            kind.__name__,
            missing=info["missing_keys"],
            unexpected=[key for key in info["unexpected_keys"] if not key.startswith(ignore)],
            mismatched=info["mismatched_keys"],
        )
    return model


def load_preprocess(path: str, size: int, dtype: torch.dtype) -> Preprocess:
    """The preprocessing with mean and std of preprocessor_config.json, by default CLIP's.  size: the tower's, in pixels."""
    mean, std = list(CLIP_MEAN), list(CLIP_STD)
    if not Path(path).is_dir() or Path(path, "preprocessor_config.json").is_file():
        with loading(path, "a preprocessor_config.json"):
            processor = CLIPImageProcessor.from_pretrained(path)
            mean, std = processor.image_mean, processor.image_std
    return Preprocess(size, mean, std, dtype=dtype)


def load_tokenizer(path: str, model: Any) -> Any:
    """The tokenizer of `model`, a CLIPModel.  Raises ModelError if it is missing or belongs to another model."""
    with loading(path, "a tokenizer (tokenizer.json)"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    text = model.config.text_config
    greatest = max(tokenizer.get_vocab().values())
    # transformers pools at the end-of-text token. Old configurations say 2 and mean the greatest id.
    end = greatest if text.eos_token_id == 2 else text.eos_token_id
    if greatest >= text.vocab_size or tokenizer.eos_token_id != end:
        raise ModelError(
            f"{path}: the tokenizer (ids up to {greatest}, end of text {tokenizer.eos_token_id}) is not the "
            f"model's (vocabulary {text.vocab_size}, end of text {end}). Use the one it was trained with"
        )
    return tokenizer


def count_longer(tokenizer: Any, prompts: Sequence[str], limit: int) -> int:
    """Number of prompts with more than `limit` tokens, special tokens included.  tokenizer: of transformers."""
    return sum(len(ids) > limit for ids in tokenizer(list(prompts), verbose=False).input_ids)
