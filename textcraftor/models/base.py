"""Base pipelines and the modules that are tuned.

A `Base` is a frozen diffusers pipeline (SD 1.x, SD 2.x, SDXL). A `TunedModel` holds the modules that replace its own from the
switch on. Embeddings come from the pipeline's own `encode_prompt`.
"""

import contextlib
import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from torch import Tensor, nn

from textcraftor.candidate import Candidate
from textcraftor.config import BaseConfig
from textcraftor.distributed.fsdp import is_sharded
from textcraftor.errors import ConfigError, ModelError, unknown
from textcraftor.models.conditioning import Conditioning
from textcraftor.models.loading import ENCODERS, assemble, load_float32, load_module, load_pipeline
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.models.weights import check_fit

# The libraries print progress bars and hints while loading.
for _library_logging in (diffusers_logging, transformers_logging):
    _library_logging.set_verbosity_error()
    _library_logging.disable_progress_bar()
logging.getLogger("diffusers").setLevel(logging.ERROR)


ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps"),
)
"""Settings of a text encoder's config that its output depends on, beside its weights."""


@dataclass(frozen=True)
class TunedModel:
    """The modules used from the switch on. None: the base's own."""

    text_encoder: nn.Module | None = None
    unet: nn.Module | None = None
    text_encoder_2: nn.Module | None = None  # SDXL's OpenCLIP bigG
    negative_embedding: NegativeEmbedding | None = None  # in place of the empty prompt's

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The tuned text encoders, by the pipeline's names for them."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in both.items() if encoder is not None}


@dataclass(frozen=True)
class Base:
    """A frozen text-to-image pipeline: its parameters receive no gradient."""

    pipe: Any  # a Stable Diffusion pipeline, whose lazily imported class is opaque to a type checker
    device: torch.device
    config: BaseConfig = field(repr=False)

    @cached_property
    def encoders(self) -> dict[str, nn.Module]:
        """E0, the frozen text encoders, by the pipeline's names for them: one, or SDXL's two."""
        found = {name: getattr(self.pipe, name, None) for name in ENCODERS}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The first text encoder: CLIP ViT-L in SD 1.x and SDXL, OpenCLIP-H in SD 2.x."""
        return cast(nn.Module, self.pipe.text_encoder)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of UNet and VAE. Text encoders, latents and all that is tuned are float32."""
        return cast(torch.dtype, self.pipe.unet.dtype)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        unet = self.pipe.unet.config
        return unet.in_channels, unet.sample_size, unet.sample_size

    def conditioning(self, prompts: Sequence[str], tuned: TunedModel | None = None) -> Conditioning:
        """Embed B prompts and the empty prompt with the pipeline's own `encode_prompt`: both halves of guidance.

        tuned: its text encoders and negative embedding replace the base's, and gradient to them is kept. None: the base.
        Prompts beyond the tokenizer's limit are truncated. SDXL's empty prompt is zeros where the base says so.
        """
        conditioning = self._encode(list(prompts), tuned.encoders if tuned else {})
        if tuned and tuned.negative_embedding:
            conditioning = tuned.negative_embedding.replace(conditioning)
        return conditioning.to(self.dtype)

    def _encode(self, prompts: list[str], encoders: dict[str, nn.Module]) -> Conditioning:
        pipe = self._pipeline_with(encoders)
        if "text_encoder_2" not in self.encoders:
            positive, _ = pipe.encode_prompt(prompts, self.device, 1, False)
            negative, _ = pipe.encode_prompt([""], self.device, 1, False)
            return Conditioning(torch.cat([negative.expand_as(positive), positive]))
        positive, _, pooled, _ = pipe.encode_prompt(prompts, None, self.device, 1, False)
        # With guidance on, the pipeline decides what the empty prompt is: zeros, or the embedding of "".
        _, negative, _, negative_pooled = pipe.encode_prompt([""], None, self.device, 1, True)
        return Conditioning(
            torch.cat([negative.expand_as(positive), positive]),
            torch.cat([negative_pooled.expand_as(pooled), pooled]),
            self._time_ids(2 * len(prompts)),
        )

    def vae_input(self, latents: Tensor) -> Tensor:
        """Latents unscaled and in the VAE's dtype, ready for `vae.decode`."""
        vae = self.pipe.vae
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return (latents / vae.config.scaling_factor).to(vae.dtype)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return cast(Tensor, latents * std / vae.config.scaling_factor + mean).to(vae.dtype)

    def trainable(self, name: str) -> nn.Module:
        """A copy of one module ("text_encoder", "text_encoder_2", "unet") to be trained: float32, on the device.

        If the base has a lower precision, the module is read from the file again, so training starts from unrounded weights.
        Raises ConfigError when this base has no such module.
        """
        known = [*self.encoders, "unet"]
        if name not in known:
            raise ConfigError(f"{unknown('module', name, known)} Base {self.config.path} has no other to tune")
        frozen = getattr(self.pipe, name)
        exact = frozen.dtype in (torch.float32, torch.float64)
        module = copy.deepcopy(frozen) if exact else load_float32(self.config, name)
        return cast(nn.Module, module.to(self.device).float().requires_grad_(True).eval())

    def autocast(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Context in which a module with float32 weights computes in the base's dtype. Weights and gradients stay float32."""
        if is_sharded(module) or next(module.parameters()).dtype == self.dtype:  # a split one is rounded as it is gathered
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _pipeline_with(self, encoders: dict[str, nn.Module]) -> Any:
        if all(encoder is self.encoders.get(name) for name, encoder in encoders.items()):
            return self.pipe
        if foreign := encoders.keys() - self.encoders.keys():
            raise ModelError(f"Base {self.config.path} has no {', '.join(sorted(foreign))}; it has {', '.join(self.encoders)}")
        options = {key: self.pipe.config[key] for key in ("force_zeros_for_empty_prompt",) if key in self.pipe.config}
        return assemble(type(self.pipe), {**self.pipe.components, **encoders}, options)

    def _time_ids(self, rows: int) -> Tensor:
        """(rows, 6): original size, crop and target size, as the pipeline's own call computes them for an uncropped image."""
        size = (self.config.resolution, self.config.resolution)
        width = self.pipe.text_encoder_2.config.projection_dim
        ids = self.pipe._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=width)
        return cast(Tensor, ids.to(self.device).expand(rows, -1))


def load_candidate(candidate: Candidate, base: Base) -> TunedModel | None:
    """The candidate's modules, frozen, in float32 as they were trained, on the base's device; None for the base.

    Raises ModelError when a file is damaged, or a module does not fit the base's, naming the keys.
    """
    if not candidate.parts:
        return None
    return load_modules(candidate, base.pipe, base.device, f"base {base.config.path}")


def load_modules(
    candidate: Candidate, pipe: Any, device: torch.device | None = None, whose: str = "this pipeline"
) -> TunedModel:
    """The candidate's modules for a pipeline, frozen, in float32 as they were trained.

    whose: the pipeline, for messages.
    Raises ModelError when a file is damaged, or a module does not fit the pipeline's, naming the keys.
    """
    modules: dict[str, Any] = {}
    for name, folder in candidate.parts.items():
        if name == "negative_embedding":
            modules[name] = NegativeEmbedding.from_pretrained(folder)
            continue
        frozen = getattr(pipe, name, None)
        if frozen is None:
            raise ModelError(f"Candidate {candidate.name} has a {name}, and {whose} has none")
        module = load_module(type(frozen), folder, torch.float32)
        check_fit(folder, f"the {name} of {whose}", module.state_dict(), frozen.state_dict())
        modules[name] = module.eval()
    model = TunedModel(**{name: module.requires_grad_(False).to(device) for name, module in modules.items()})
    require_same_architecture(candidate.name, model, pipe, whose)
    return model


def require_same_architecture(name: str, model: TunedModel, pipe: Any, whose: str = "this pipeline") -> None:
    """Raises ModelError when a text encoder computes otherwise than the pipeline's, whether or not its weights fit."""
    for part, encoder in model.encoders.items():
        frozen = getattr(pipe, part, None)
        if frozen is None:
            raise ModelError(f"{name} has a {part}, and {whose} has none")
        ours, theirs = (cast(Any, each).config for each in (encoder, frozen))
        for setting in ARCHITECTURE:
            got, needed = getattr(ours, setting, None), getattr(theirs, setting, None)
            if got != needed:
                raise ModelError(f"{name} was tuned on another base: {setting} of its {part} is {got}, and {needed} in {whose}")


def load_base(config: BaseConfig, device: torch.device) -> Base:
    """Load a base pipeline and freeze its parameters.

    Raises ModelError when a file is missing, truncated or does not fit, naming it and the keys.
    """
    pipe = load_pipeline(config)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.to(device)
    return Base(pipe, device, config)
