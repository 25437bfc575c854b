"""Tuned modules on disk, as old and new readers expect them."""

from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

_PREFIX: Final = "text_model."


def save_module(module: Any, folder: Path) -> None:
    """Write a module with its `save_pretrained`; the keys of a CLIP text encoder always start with "text_model.".

    transformers 5.6 and later leave the prefix out unless the base's file had it. They read both, but transformers 4, ComfyUI,
    the WebUI and kohya read only keys with the prefix, and take random weights or none where they find none.
    """
    module.save_pretrained(folder)
    if not isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        return
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        named = {key if key.startswith((_PREFIX, "text_projection")) else _PREFIX + key: each for key, each in tensors.items()}
        if named.keys() != tensors.keys():
            save_file(named, path, metadata={"format": "pt"})
