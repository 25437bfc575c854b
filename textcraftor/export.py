"""Write a tuned text encoder in the formats that other tools read, and measure what each format loses.

    diffusers    text_encoder/ (text_encoder_2/): for `from_pretrained(..., text_encoder=...)`; keys are always `text_model.*`
    pipeline     the whole pipeline with the tuned encoder in place of the base's
    single-file  the whole pipeline as one .safetensors file in the original layout: WebUI, ComfyUI, `from_single_file`
    lora-kohya   one .safetensors file with lora_down, lora_up and alpha: WebUI, ComfyUI, diffusers
    lora-peft    one .safetensors file with lora_A and lora_B: diffusers by peft

A LoRA is the best approximation of given rank of the difference to the base, by singular values, layer by layer.
Biases, norms and embeddings have no place in it.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from textcraftor.artifact import written_aside
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.loading import assemble
from textcraftor.models.saving import save_module
from textcraftor.models.single_file_export import original_tensors

Format = Literal["diffusers", "pipeline", "single-file", "lora-kohya", "lora-peft"]
PROMPTS: Final = ("a small red circle", "a huge blue square on a white background", "a glossy star left of a tiny green ring")
KOHYA: Final = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


@dataclass(frozen=True)
class Exported:
    """path: what was written.  lost: share of the tuned difference (Frobenius norm) that the format does not hold."""

    path: Path
    lost: float = 0.0


def export(model: TunedModel, base: Base, to: Format, out: Path, rank: int = 16) -> Exported:
    """Write the tuned encoders to `out`, replacing what is there.

    rank: of a LoRA.  Raises ModelError for a model with a UNet or negative embedding of its own that the format cannot hold.
    """
    if model.negative_embedding or (model.unet is not None and to not in ("pipeline", "single-file")):
        part = "negative embedding" if model.negative_embedding else "UNet of its own"
        raise ModelError(f"This model has a {part}, which {to} cannot hold. Use `textcraftor.control`, see docs/style.md")
    if to in ("lora-kohya", "lora-peft"):
        return _export_lora(model, base, to == "lora-kohya", out, rank)
    with written_aside(out) as aside:
        if to == "single-file":
            save_file(original_tensors(_whole(model, base)), aside, metadata={"format": "pt"})
            return Exported(out)
        if to == "pipeline":
            _whole(model, base).save_pretrained(aside)
        aside.mkdir(exist_ok=True)
        for name, encoder in model.encoders.items():
            save_module(encoder, aside / name)
    return Exported(out)


def reload(to: Format, path: Path, base: Base) -> Any:
    """The pipeline that a user of diffusers gets from an export, by diffusers' own loaders."""
    options = {key: base.pipe.config[key] for key in ("force_zeros_for_empty_prompt",) if key in base.pipe.config}
    if to == "pipeline":
        pipe = DiffusionPipeline.from_pretrained(path, safety_checker=None)
    elif to == "single-file":
        config: Any = base.config.config or base.config.path  # of architecture, tokenizer and scheduler
        kind: Any = type(base.pipe)
        pipe = kind.from_single_file(path, config=str(config), local_files_only=True)
    else:
        encoders: dict[str, Any] = {}
        if to == "diffusers":
            kinds: dict[str, Any] = {name: type(each) for name, each in base.encoders.items() if (path / name).is_dir()}
            encoders = {name: kind.from_pretrained(path / name) for name, kind in kinds.items()}
        components = {name: _copy(part) for name, part in base.pipe.components.items()}
        pipe = assemble(type(base.pipe), {**components, **encoders}, options)
        if not encoders:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(base.device)


@torch.no_grad()
def differences(
    pipe: Any, model: TunedModel, base: Base, prompts: tuple[str, ...] = PROMPTS, steps: int = 10
) -> list[tuple[float, float]]:
    """(mean, maximum) absolute difference of each prompt's picture, of 255, between a re-loaded export and the tuned model."""
    ours = _whole(model, base)
    ours.set_progress_bar_config(disable=True)
    found = []
    for seed, prompt in enumerate(prompts):
        ours_picture, theirs = (_draw(each, prompt, seed, steps, base) for each in (ours, pipe))
        difference = (ours_picture - theirs).abs() * 255
        found.append((float(difference.mean()), float(difference.max())))
    return found


def _whole(model: TunedModel, base: Base) -> Any:
    """The base's pipeline with the tuned modules in place of its own."""
    options = {key: base.pipe.config[key] for key in ("force_zeros_for_empty_prompt",) if key in base.pipe.config}
    parts: Any = {**model.encoders, **({"unet": model.unet} if model.unet is not None else {})}
    return assemble(type(base.pipe), {**base.pipe.components, **parts}, options)


def _draw(pipe: Any, prompt: str, seed: int, steps: int, base: Base) -> Tensor:
    side = base.config.resolution
    noise = torch.Generator("cpu").manual_seed(seed)
    drawn = pipe(prompt, height=side, width=side, num_inference_steps=steps, generator=noise, output_type="pt")
    return drawn.images[0].float().cpu()


def _copy(part: Any) -> Any:
    return copy.deepcopy(part) if isinstance(part, nn.Module) else part


def _export_lora(model: TunedModel, base: Base, kohya: bool, out: Path, rank: int) -> Exported:
    tensors: dict[str, Tensor] = {}
    kept = whole = 0.0
    for part, encoder in model.encoders.items():
        frozen = dict(base.encoders[part].named_parameters())
        linear = {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
        for name, weight in encoder.named_parameters():
            delta = (weight.detach() - frozen[name].detach()).float().cpu()
            size = float(delta.square().sum())
            whole += size
            if name not in linear or size == 0 or ".layers." not in name:
                continue
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
            used = min(rank, len(values))
            kept += float(values[:used].square().sum())
            root = values[:used].sqrt()
            up, down = (left[:, :used] * root).contiguous(), (root[:, None] * right[:used]).contiguous()
            key = name.removesuffix(".weight")
            key = key if key.startswith("text_model.") else f"text_model.{key}"
            if kohya:
                stem = f"{_kohya_part(part, base)}_{key.replace('.', '_')}"
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                tensors[f"{stem}.alpha"] = torch.tensor(float(used))
            else:
                tensors |= {f"{part}.{key}.lora_A.weight": down, f"{part}.{key}.lora_B.weight": up}
    if not tensors:
        raise ModelError("The encoder does not differ from the base's in any layer that a LoRA holds")
    with written_aside(out) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    return Exported(out, max(0.0, 1 - kept / whole) ** 0.5)


def _kohya_part(part: str, base: Base) -> str:
    """SDXL's encoders are numbered, the one of SD 1.x and 2.x is not."""
    return "lora_te1" if part == "text_encoder" and "text_encoder_2" in base.encoders else KOHYA[part]
