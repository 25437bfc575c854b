"""Load the modules of a single-file checkpoint, the original layout that ComfyUI and the WebUI use.

diffusers' own `from_single_file` only logs missing keys, and takes a module that the file lacks from the folder that
should merely describe the architecture. So only its key mappings are used here, and loading is strict.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_diffusers_clip_model_from_ldm,
)
from safetensors.torch import load_file
from torch import Tensor

from textcraftor.errors import ModelError
from textcraftor.models.diagnosis import fault_of
from textcraftor.models.weights import LOADING_ERRORS, brief, check_fit, require_matching_keys

CONVERTERS = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}


def read_modules(path: Path, config_folder: Path, classes: Mapping[str, str]) -> dict[str, Any]:
    """The modules in a checkpoint, in float32.

    config_folder: a diffusers folder whose config.json files give the architecture; no weights of it are read.
    classes: module -> class, as in model_index.json.  Raises ModelError naming the file, the module and the keys.
    """
    try:
        tensors = load_file(path)
    except LOADING_ERRORS as error:
        raise ModelError(fault_of(path) or f"{path} cannot be read: {brief(error)}") from None
    _require_whole_checkpoint(path, tensors)
    modules = {}
    for name, cls in classes.items():
        try:
            read = _diffusers if name in CONVERTERS else _text_encoder
            modules[name] = read(f"{path} ({name})", name, cls, dict(tensors), config_folder)
        except KeyError as error:
            raise ModelError(f"{path} ({name}) does not fit {cls} (missing keys: {error}). Nothing was loaded") from None
        except LOADING_ERRORS as error:
            raise ModelError(f"{path} ({name}) does not fit {cls}: {brief(error)}. Nothing was loaded") from None
    return modules


def _require_whole_checkpoint(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError for a file that is something else than a checkpoint of UNet, VAE and text encoder."""
    parts = {
        "UNet": ("model.diffusion_model.",),
        "VAE": ("first_stage_model.",),
        "text encoder": ("cond_stage_model.", "conditioner.embedders."),
    }
    if any(key.endswith((".scale_weight", "scaled_fp8", ".weight_scale")) for key in tensors):
        raise ModelError(f"{path} is quantized with scales of its own (scaled float8), which are not read. Use the original")
    if any("lora_" in key for key in tensors):
        raise ModelError(f"{path} is a LoRA, not a checkpoint. Give the base that it was made for")
    missing = [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in tensors)]
    if len(missing) == len(parts):
        raise ModelError(f"{path} is no checkpoint in the original layout: no key starts with model.diffusion_model")
    if missing:
        raise ModelError(f"{path} is pruned: it has no {' and no '.join(missing)}. Use a complete checkpoint")


def _diffusers(label: str, name: str, cls_name: str, tensors: dict[str, Tensor], config_folder: Path) -> Any:
    cls = getattr(diffusers, cls_name)
    config = cls.load_config(config_folder, subfolder=name)
    with init_empty_weights():
        module = cls.from_config(config)
    converted = CONVERTERS[name](tensors, config)
    check_fit(label, cls_name, converted, module.state_dict())
    module.load_state_dict({key: value.float() for key, value in converted.items()}, assign=True)
    return module


def _text_encoder(label: str, name: str, cls_name: str, tensors: dict[str, Tensor], config_folder: Path) -> Any:
    cls = getattr(transformers, cls_name)
    module = create_diffusers_clip_model_from_ldm(
        cls, tensors, subfolder=name, config=str(config_folder), torch_dtype=torch.float32, local_files_only=True
    )
    # A file may hold more than the encoder (SD 2.x has an unused last layer), but not less.
    require_matching_keys(label, cls_name, missing=[key for key, parameter in module.named_parameters() if parameter.is_meta])
    return module
