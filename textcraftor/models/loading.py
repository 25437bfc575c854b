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
from huggingface_hub import snapshot_download
from torch import nn

from textcraftor.config import BaseConfig
from textcraftor.errors import ModelError, unknown
from textcraftor.models.single_file import read_modules
from textcraftor.models.weights import LOADING_FAULTS, brief, refuse_misfit

PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
"""The supported families by the class named in model_index.json: SD 1.x and 2.x, SDXL."""

ENCODERS = ("text_encoder", "text_encoder_2")
MODULES = (*ENCODERS, "unet", "vae")


def load_pipeline(config: BaseConfig) -> Any:
    """The frozen pipeline on the CPU; text encoders in float32, UNet and VAE in `config.dtype`.

    Raises ModelError when a file is missing, truncated, of another architecture, or of a family not supported.
    """
    components, options = _components(config)
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
    exact = config.model_copy(update={"dtype": "float32"})
    return cast(nn.Module, _modules(exact, _index(exact), [name])[name])


def load_module(cls: Any, source: str | Path, dtype: torch.dtype, **where: Any) -> Any:
    """A diffusers or transformers model, whole. where: subfolder, revision. Raises ModelError naming file and keys."""
    label = "/".join(str(part) for part in (source, where.get("subfolder")) if part)
    # transformers names a mismatched key in its log alone, unless asked to go on and report it.
    report = {"ignore_mismatched_sizes": True} if issubclass(cls, transformers.PreTrainedModel) else {}
    try:
        module, info = cls.from_pretrained(
            source, output_loading_info=True, dtype=dtype, use_safetensors=True, **report, **where
        )
    except LOADING_FAULTS as error:
        raise ModelError(f"{label} cannot be loaded as {cls.__name__}: {brief(error)}") from None
    refuse_misfit(label, cls.__name__, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return module


def dtype_of(config: BaseConfig, name: str) -> torch.dtype:
    """The precision of one module: a text encoder is small beside the rest, and it is what is tuned: float32."""
    return torch.float32 if name in ENCODERS else cast(torch.dtype, getattr(torch, config.dtype))


def _components(config: BaseConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components of the pipeline by name, and the options of its constructor."""
    index = _index(config)
    modules = _modules(config, index, [name for name in MODULES if index.get(name, [None])[0]])
    pipeline, options = PIPELINES[index["_class_name"]], {}
    if pipeline is StableDiffusionXLPipeline:
        options = {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
    return {**modules, **_rest(config, index, modules)}, {"pipeline": pipeline, **options}


def _modules(config: BaseConfig, index: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    if config.config:
        modules = read_modules(Path(config.path), Path(described_by(config)), {name: index[name][1] for name in names})
        return {name: module.to(dtype_of(config, name)) for name, module in modules.items()}
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


def described_by(config: BaseConfig) -> str:
    """The folder or hub id with model_index.json, tokenizers and scheduler: base.path, for a single file base.config.

    What a hub id describes a single file by is fetched here, without weights. Raises ModelError.
    """
    if not Path(config.path).is_file():
        if config.config:
            raise ModelError(f"base.config is for a single-file checkpoint, and base.path = {config.path} is no file")
        return config.path
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
    if Path(config.config).is_dir():
        return config.config
    try:
        return snapshot_download(config.config, revision=config.revision, allow_patterns=["*.json", "*.txt"])
    except LOADING_FAULTS as error:
        raise ModelError(f"base.config = {config.config} is no folder and cannot be fetched: {brief(error)}") from None


def _rest(config: BaseConfig, index: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizers and scheduler."""
    source, parts = described_by(config), {}
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        library, cls = index.get(name, (None, None))
        if library:
            module = getattr(diffusers if name == "scheduler" else transformers, cls)
            try:
                parts[name] = module.from_pretrained(
                    source, subfolder=name, revision=None if config.config else config.revision
                )
            except LOADING_FAULTS as error:
                raise ModelError(f"{source}: its {name} cannot be loaded: {brief(error)}") from None
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        # transformers makes an empty tokenizer where the files are missing.
        if name in parts and len(parts[name]) != modules[encoder].config.vocab_size:
            raise ModelError(
                f"{source}: its {name} cannot be loaded: it has {len(parts[name])} tokens, and the {encoder} knows "
                f"{modules[encoder].config.vocab_size}. A file of it is missing, or of another model"
            )
    return parts


def _index(config: BaseConfig) -> dict[str, Any]:
    """model_index.json: the pipeline's class, and [library, class] of each component."""
    source = described_by(config)
    try:
        index = cast(dict[str, Any], DiffusionPipeline.load_config(source, revision=None if config.config else config.revision))
    except LOADING_FAULTS as error:
        raise ModelError(f"base.path = {source}: no Stable Diffusion pipeline can be loaded: {brief(error)}") from None
    if index.get("_class_name") not in PIPELINES:
        raise ModelError(f"base.path = {source}: {unknown('pipeline', str(index.get('_class_name')), PIPELINES)}")
    return index
