"""A diffusers pipeline written as its family's original single-file checkpoint, as published ones are."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from textcraftor.models.single_file_export import original_tensors


def write_single_file(pipe: Any, path: Path) -> None:
    """SD 1.x, 2.x (an OpenCLIP encoder is told by its gelu) and SDXL. The last layer in a file of SD 2.x, which nobody uses,
    would change pictures if it were used."""
    tensors = original_tensors(pipe)
    if not hasattr(pipe, "text_encoder_2") and pipe.text_encoder.config.hidden_act == "gelu":
        unused = f"resblocks.{pipe.text_encoder.config.num_hidden_layers}."
        tensors |= {key: value + 1 for key, value in tensors.items() if unused in key}
    save_file(tensors, path)
