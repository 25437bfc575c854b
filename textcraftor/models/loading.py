"""Load pipelines and modules from the hub, a folder or a single file, strictly.

diffusers and transformers initialise a weight that a file lacks at random and only log it. Here that is an error that
names file and keys: each module is compared with its file before the pipeline is built.
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download
from torch import nn

from textcraftor.config import BaseConfig
from textcraftor.errors import ModelError
from textcraftor.models.diagnosis import fault_of, other_weights, variant_of
from textcraftor.models.single_file import read_modules
from textcraftor.models.weights import LOADING_ERRORS, brief, require_matching_keys
from textcraftor.network import require_usable_network

PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
"""The supported families by the class named in model_index.json: SD 1.x and 2.x, SDXL."""

ENCODERS = ("text_encoder", "text_encoder_2")
PADDING = 128  # rows, at most, by which embedding tables are padded to a round number
MODULES = (*ENCODERS, "unet", "vae")


def load_pipeline(config: BaseConfig) -> Any:
    """The frozen pipeline on the CPU; text encoders in float32, UNet and VAE in `config.dtype`.

    Raises ModelError when a file is missing, truncated, of another architecture, or of a family not supported.
    """
    components, options = _components(config)
    if config.tiny_vae:
        components["vae"] = load_module(AutoencoderTiny, config.tiny_vae, dtype=dtype_of(config, "vae"))
    vae, unet = components["vae"], components["unet"]
    _require_text_to_image(config, unet, vae)
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


def _require_text_to_image(config: BaseConfig, unet: Any, vae: Any) -> None:
    """Raises ModelError for a UNet that needs more than noisy latents, such as a picture to paint into."""
    takes, latents = unet.config.in_channels, vae.config.latent_channels
    kind = {9: ", as inpainting models do", 8: ", as models that edit or upscale a picture do"}.get(takes, "")
    if takes != latents:
        raise ModelError(
            f"base.path = {config.path}: its UNet takes {takes} channels and the VAE's latents have {latents}{kind}. "
            "Only text-to-image models can be tuned here"
        )


def assemble(pipeline: Any, components: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A pipeline of these components, without safety checker and watermark."""
    if "safety_checker" in signature(pipeline.__init__).parameters:
        disabled = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        disabled = {"add_watermarker": False}
    return pipeline(**{**components, **options, **disabled})


def load_float32(config: BaseConfig, name: str) -> nn.Module:
    """One module of the base in float32, read from its file: unrounded weights to start training from."""
    exact = config.model_copy(update={"dtype": "float32"})
    return cast(nn.Module, _modules(exact, _index(exact), [name])[name])


def load_module(cls: Any, source: str | Path, dtype: torch.dtype, **where: Any) -> Any:
    """Load a diffusers or transformers model strictly. where: subfolder, revision. Raises ModelError naming file and keys."""
    label = "/".join(str(part) for part in (source, where.get("subfolder")) if part)
    folder = Path(label)
    variant = variant_of(folder)  # many published folders hold half precision only
    # transformers reports mismatched keys only if told to ignore them, and logs them otherwise.
    report = {"ignore_mismatched_sizes": True} if issubclass(cls, transformers.PreTrainedModel) else {}
    try:
        module, info = cls.from_pretrained(
            source, output_loading_info=True, dtype=dtype, use_safetensors=True, variant=variant, **report, **where
        )
    except LOADING_ERRORS as error:
        if folder.is_dir() and (fault := fault_of(folder) or other_weights(folder)):
            raise ModelError(f"{fault}. Nothing was loaded as {cls.__name__}") from None
        raise ModelError(f"{label} cannot be loaded as {cls.__name__}: {brief(error)}") from None
    require_matching_keys(label, cls.__name__, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return module


def dtype_of(config: BaseConfig, name: str) -> torch.dtype:
    """The dtype of one module. Text encoders are float32: they are tuned, and small beside the rest."""
    return torch.float32 if name in ENCODERS else cast(torch.dtype, getattr(torch, config.dtype))


def _components(config: BaseConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components of the pipeline by name, and the options of its constructor."""
    index = _index(config)
    modules = _modules(config, index, [name for name in MODULES if index.get(name, [None])[0]])
    pipeline, options = PIPELINES[index["_class_name"]], {}
    if pipeline is StableDiffusionXLPipeline:
        options = {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
    return {**modules, **_tokenizers_and_scheduler(config, index, modules)}, {"pipeline": pipeline, **options}


def _modules(config: BaseConfig, index: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    if config.config:
        modules = read_modules(Path(config.path), Path(config_source(config)), {name: index[name][1] for name in names})
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


def config_source(config: BaseConfig) -> str:
    """Folder or hub id with model_index.json, tokenizers and scheduler: base.path, or base.config for a single file.

    If base.config is a hub id, its configuration files are downloaded here, without weights. Raises ModelError.
    """
    if not Path(config.path).is_file():
        if not Path(config.path).is_dir():
            require_usable_network()  # a hub id
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
    except LOADING_ERRORS as error:
        raise ModelError(f"base.config = {config.config} is no folder and cannot be fetched: {brief(error)}") from None


def _tokenizers_and_scheduler(config: BaseConfig, index: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Load the tokenizers and the scheduler."""
    source, parts = config_source(config), {}
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        library, cls = index.get(name, (None, None))
        if library:
            module = getattr(diffusers if name == "scheduler" else transformers, cls)
            try:
                parts[name] = module.from_pretrained(
                    source, subfolder=name, revision=None if config.config else config.revision
                )
            except LOADING_ERRORS as error:
                raise ModelError(f"{source}: its {name} cannot be loaded: {brief(error)}") from None
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        # transformers builds an empty tokenizer if the files are missing.
        if name not in parts:
            continue
        # An embedding table may be padded with rows that no token uses.
        rows = modules[encoder].config.vocab_size
        if not max(rows / 2, rows - PADDING) < len(parts[name]) <= rows:
            raise ModelError(
                f"{source}: its {name} cannot be loaded: it has {len(parts[name])} tokens, and the {encoder} knows "
                f"{rows}. A file of it is missing, or of another model"
            )
    return parts


def _index(config: BaseConfig) -> dict[str, Any]:
    """model_index.json: the pipeline's class, and [library, class] of each component."""
    source = config_source(config)
    try:
        index = cast(dict[str, Any], DiffusionPipeline.load_config(source, revision=None if config.config else config.revision))
    except LOADING_ERRORS as error:
        raise ModelError(f"base.path = {source}: no Stable Diffusion pipeline can be loaded: {brief(error)}") from None
    if index.get("_class_name") not in PIPELINES:
        raise ModelError(
            f"base.path = {source} is a {index.get('_class_name')}. Known text-to-image pipelines: {', '.join(PIPELINES)}"
        )
    return index
