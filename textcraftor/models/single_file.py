"""The modules of a single-file checkpoint, the original layout that ComfyUI and the WebUI use.

diffusers' own `from_single_file` takes a module whose keys are missing from its log's point of view only, and one that
is missing altogether from the folder that should merely describe it. So its key mappings are used, and the loading is
strict.
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
from textcraftor.models.weights import LOADING_FAULTS, brief, check_fit, refuse_misfit

CONVERTERS = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}


def read_modules(path: Path, described: Path, classes: Mapping[str, str]) -> dict[str, Any]:
    """The modules in a checkpoint, in float32.

    described: a diffusers folder whose config.json files give the architecture; no weights of it are read.
    classes: module -> class, as in model_index.json.  Raises ModelError naming the file, the module and the keys.
    """
    try:
        tensors = load_file(path)
    except LOADING_FAULTS as error:
        raise ModelError(f"{path} cannot be read: {brief(error)}") from None
    modules = {}
    for name, cls in classes.items():
        try:
            read = _diffusers if name in CONVERTERS else _text_encoder
            modules[name] = read(f"{path} ({name})", name, cls, dict(tensors), described)
        except KeyError as error:
            raise ModelError(f"{path} ({name}) does not fit {cls} (missing keys: {error}). Nothing was loaded") from None
        except LOADING_FAULTS as error:
            raise ModelError(f"{path} ({name}) does not fit {cls}: {brief(error)}. Nothing was loaded") from None
    return modules


def _diffusers(label: str, name: str, cls_name: str, tensors: dict[str, Tensor], described: Path) -> Any:
    cls = getattr(diffusers, cls_name)
    config = cls.load_config(described, subfolder=name)
    with init_empty_weights():
        module = cls.from_config(config)
    converted = CONVERTERS[name](tensors, config)
    check_fit(label, cls_name, converted, module.state_dict())
    module.load_state_dict({key: value.float() for key, value in converted.items()}, assign=True)
    return module


def _text_encoder(label: str, name: str, cls_name: str, tensors: dict[str, Tensor], described: Path) -> Any:
    cls = getattr(transformers, cls_name)
    module = create_diffusers_clip_model_from_ldm(
        cls, tensors, subfolder=name, config=str(described), torch_dtype=torch.float32, local_files_only=True
    )
    # A file may hold more than the encoder, as SD 2.x's does a last layer that nobody uses; it may not hold less.
    refuse_misfit(label, cls_name, missing=[key for key, parameter in module.named_parameters() if parameter.is_meta])
    return module
