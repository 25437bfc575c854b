"""Pipelines and modules from the hub, a folder or a single file: loaded whole, or refused by file and key.

diffusers and transformers fill a weight that a file lacks with random numbers, and say so in a log. Here that is an
error: each module is compared with its file key by key before a pipeline is made of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError
from torch import nn

from textcraftor.config import BaseConfig
from textcraftor.errors import ModelError, unknown

PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
"""The supported families by the class named in model_index.json: SD 1.x and 2.x, SDXL."""

ENCODERS = ("text_encoder", "text_encoder_2")
MODULES = (*ENCODERS, "unet", "vae")

LOADING_FAULTS = (OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError, AttributeError)


def load_pipeline(config: BaseConfig) -> Any:
    """The frozen pipeline on the CPU; text encoders in float32, UNet and VAE in `config.dtype`.

    Raises ModelError when a file is missing, truncated, of another architecture, or of a family not supported.
    """
    components, options = _single_file(config) if Path(config.path).is_file() else _folder_or_hub(config)
    if config.tiny_vae:
        components["vae"] = load_module(AutoencoderTiny, config.tiny_vae, dtype=dtype_of(config, "vae"))
    vae, unet = components["vae"], components["unet"]
    if config.dtype == "float16" and vae.config.force_upcast:
        vae.float()  # such a VAE overflows in float16
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if config.resolution % factor:
        raise ModelError(f"base.resolution = {config.resolution} is not a multiple of {factor}, the VAE's scale factor")
    unet.register_to_config(sample_size=config.resolution // factor)
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    pipe = assemble(options.pop("pipeline"), components, options)
    for name in MODULES:
        if module := components.get(name):
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble(pipeline: Any, components: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A pipeline of these parts, and of nothing that only adds to the picture's fate: no safety checker, no watermark."""
    if pipeline is StableDiffusionPipeline:
        left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        left_out = {"add_watermarker": False}
    return pipeline(**{**components, **options, **left_out})


def load_master(config: BaseConfig, name: str) -> nn.Module:
    """One module of the base in float32, from its file: what is trained starts from unrounded weights."""
    return cast(nn.Module, _modules(config.model_copy(update={"dtype": "float32"}), [name])[name])


def load_module(cls: Any, source: str | Path, dtype: torch.dtype, **where: Any) -> Any:
    """A diffusers or transformers model, whole. where: subfolder, revision. Raises ModelError naming file and keys."""
    label = "/".join(str(part) for part in (source, where.get("subfolder")) if part)
    try:
        module, info = cls.from_pretrained(source, output_loading_info=True, dtype=dtype, use_safetensors=True, **where)
    except LOADING_FAULTS as error:
        raise ModelError(f"{label} cannot be loaded as {cls.__name__}: {brief(error)}") from None
    refuse(label, cls, {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")})
    return module


def refuse(label: str, cls: Any, faults: Mapping[str, Any]) -> None:
    """Raise ModelError when there is any faulty key; kind of fault -> keys."""
    named = [f"{kind} keys: {_some(keys)}" for kind, keys in faults.items() if keys]
    if named:
        raise ModelError(f"{label} does not fit {cls.__name__} ({'; '.join(named)}). Nothing was loaded")


def dtype_of(config: BaseConfig, name: str) -> torch.dtype:
    """The precision of one module: a text encoder is small beside the rest, and it is what is tuned: float32."""
    return torch.float32 if name in ENCODERS else cast(torch.dtype, getattr(torch, config.dtype))


def brief(error: Exception) -> str:
    """An exception of a library as one line."""
    return " ".join(str(error).split())[:400]


def _folder_or_hub(config: BaseConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components of the pipeline by name, and the options of its constructor."""
    index = _index(config.path, config.revision, "base.path")
    where = {"revision": config.revision}
    components = _modules(config, [name for name in MODULES if index.get(name, [None])[0]])
    try:
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            library, cls = index.get(name, (None, None))
            if library:
                module = getattr(diffusers if name == "scheduler" else transformers, cls)
                components[name] = module.from_pretrained(config.path, subfolder=name, **where)
    except LOADING_FAULTS as error:
        raise ModelError(f"base.path = {config.path}: its {name} cannot be loaded: {brief(error)}") from None
    return components, _options(index)


def _modules(config: BaseConfig, names: list[str]) -> dict[str, Any]:
    if Path(config.path).is_file():
        components, _ = _single_file(config)
        return {name: components[name] for name in names}
    index = _index(config.path, config.revision, "base.path")
    return {
        name: load_module(
            getattr(transformers if name in ENCODERS else diffusers, index[name][1]),
            config.path,
            dtype_of(config, name),
            subfolder=name,
            revision=config.revision,
        )
        for name in names
    }


def _single_file(config: BaseConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of an original checkpoint (ComfyUI, WebUI). Architecture, tokenizer, scheduler: from base.config."""
    if not config.path.endswith(".safetensors"):
        raise ModelError(
            f"base.path = {config.path}: a single-file checkpoint must be .safetensors; other formats run code when read. "
            "Convert it first"
        )
    if not config.config:
        raise ModelError(
            f"base.path = {config.path} is a single file. Set base.config to a diffusers folder or hub id of its family: "
            "it names the architecture, tokenizer and scheduler (prediction type included), its weights are not read"
        )
    index = _index(config.config, config.revision, "base.config")
    options = _options(index)
    try:
        pipe = options["pipeline"].from_single_file(
            config.path,
            config=config.config,
            revision=config.revision,
            local_files_only=Path(config.config).is_dir(),
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
        )
    except LOADING_FAULTS as error:
        raise ModelError(f"base.path = {config.path} cannot be loaded as {index['_class_name']}: {brief(error)}") from None
    components = {name: part for name, part in pipe.components.items() if part is not None}
    for name in MODULES:
        if module := components.get(name):
            missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
            refuse(f"{config.path} ({name})", type(module), {"missing": missing})
            module.to(dtype_of(config, name))
    return components, options


def _index(source: str, revision: str | None, key: str) -> dict[str, Any]:
    """model_index.json of a folder or hub id: class of the pipeline, and [library, class] of each component."""
    try:
        index = cast(dict[str, Any], DiffusionPipeline.load_config(source, revision=revision))
    except LOADING_FAULTS as error:
        raise ModelError(f"{key} = {source}: no Stable Diffusion pipeline can be loaded: {brief(error)}") from None
    if index.get("_class_name") not in PIPELINES:
        raise ModelError(f"{key} = {source}: {unknown('pipeline', str(index.get('_class_name')), PIPELINES)}")
    return index


def _options(index: Mapping[str, Any]) -> dict[str, Any]:
    pipeline = PIPELINES[index["_class_name"]]
    if pipeline is StableDiffusionPipeline:
        return {"pipeline": pipeline}
    return {"pipeline": pipeline, "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}


def _some(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
