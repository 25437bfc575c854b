"""Base pipelines and what of them is tuned.

A `Base` is a frozen diffusers pipeline, a `TunedModel` what takes over from it at the switch. Embeddings come from
the pipeline's own `encode_prompt`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel

from textcraftor.candidate import Candidate
from textcraftor.config import BaseConfig
from textcraftor.errors import ModelError

# Loading prints bars and hints meant for notebooks; our own messages say what matters.
for _library_logging in (diffusers_logging, transformers_logging):
    _library_logging.set_verbosity_error()
    _library_logging.disable_progress_bar()
logging.getLogger("diffusers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Base:
    """A frozen text-to-image pipeline: nothing in it receives a gradient of its own."""

    pipe: Any  # StableDiffusionPipeline, whose lazily imported class is opaque to a type checker
    device: torch.device

    @cached_property
    def text_encoder(self) -> nn.Module:
        """E0, the frozen text encoder."""
        return cast(nn.Module, self.pipe.text_encoder)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        unet = self.pipe.unet.config
        return unet.in_channels, unet.sample_size, unet.sample_size

    def prompt_embeds(self, prompts: Sequence[str], text_encoder: nn.Module) -> Tensor:
        """Embed prompts with the given encoder, by the pipeline's own `encode_prompt`.

        Returns (2B, L, D): the empty prompt's embedding B times, then the prompts' (diffusers' order for guidance).
        The gradient to the encoder is kept. Prompts beyond the tokenizer's limit are truncated.
        """
        pipe = self._with(text_encoder)
        positive, _ = pipe.encode_prompt(list(prompts), self.device, 1, False)
        negative, _ = pipe.encode_prompt([""], self.device, 1, False)
        both = torch.cat([negative.expand_as(positive), positive])
        return both.to(self.pipe.unet.dtype)

    def _with(self, text_encoder: nn.Module) -> Any:
        if text_encoder is self.pipe.text_encoder:
            return self.pipe
        return StableDiffusionPipeline(**{**self.pipe.components, "text_encoder": text_encoder}, requires_safety_checker=False)


@dataclass(frozen=True)
class TunedModel:
    """What takes over at the switch: a text encoder, and a UNet (None: the base's own)."""

    text_encoder: nn.Module
    unet: nn.Module | None = None


def load_candidate(candidate: Candidate, base: Base) -> TunedModel | None:
    """The candidate's modules, frozen, on the base's device; None for the base. Raises ModelError."""
    if candidate.text_encoder is None:
        return None
    encoder = _load_module(CLIPTextModel, candidate.text_encoder, base)
    return TunedModel(encoder, _load_module(UNet2DConditionModel, candidate.unet, base) if candidate.unet else None)


def choose_device(device: str = "auto", cpu_threads: int | None = None) -> torch.device:
    """`auto`: the GPU where there is one. cpu_threads: how many torch may use on the CPU, None for all.

    Raises ModelError for a device that torch does not know or have.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"Device {device!r} cannot be used: {str(error).splitlines()[0]}. Try cpu, cuda or auto") from None
    return chosen


def load_base(config: BaseConfig, device: torch.device) -> Base:
    """Load and freeze a base pipeline; its VAE and UNet receive no gradient, ever.

    Raises ModelError when the folder is missing, a weight file is missing, truncated, or does not fit.
    """
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise ModelError(f"base.path = {config.path}: no Stable Diffusion pipeline can be loaded: {_brief(error)}") from None
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval().to(device)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if expected != config.resolution:
        pipe.unet.register_to_config(sample_size=config.resolution // pipe.vae_scale_factor)
    return Base(pipe, device)


def _load_module(cls: Any, folder: Path, base: Base) -> nn.Module:
    try:
        module, info = cls.from_pretrained(folder, output_loading_info=True, dtype=base.pipe.unet.dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded as {cls.__name__}: {_brief(error)}") from None
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    named = [f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in faults.items() if keys]
    if named:
        raise ModelError(f"{folder} does not fit {cls.__name__} ({'; '.join(named)}). Nothing was loaded")
    return cast(nn.Module, module.requires_grad_(False).eval().to(base.device))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
