"""Low-rank updates (LoRA, arXiv 2106.09685) of a text encoder or UNet, by `peft`.

Trained beside the frozen weights and merged into them when saved, so a candidate is a folder of plain weights either way.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from textcraftor.artifact import write_json
from textcraftor.config import TuneConfig

# Attention projections as transformers' CLIP and as diffusers' UNet call them; CLIP's MLP too.
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "to_q", "to_k", "to_v", "to_out.0"]


def add_lora(model: nn.Module, tune: TuneConfig) -> nn.Module:
    """Freeze the model and add a trainable low-rank update. It starts as zero; its random factor is drawn from the seed."""
    model.requires_grad_(False)
    settings = LoraConfig(r=tune.lora_rank, lora_alpha=tune.lora_alpha, target_modules=TARGETS)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tune.seed)
        return inject_adapter_in_model(settings, model)


def merge_lora(model: nn.Module, folder: Path) -> Any:
    """A copy with the update merged in; the update alone is written to `folder`. A model without LoRA is returned as it is."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        return model
    folder.mkdir(parents=True)
    update = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(model).items()}
    save_file(update, folder / "adapter_model.safetensors")
    config: Any = model.peft_config["default"]  # type: ignore[index]
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha, "target_modules": TARGETS},
    )
    plain = copy.deepcopy(model)
    for name, _ in layers:
        layer: Any = plain.get_submodule(name)
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(attribute, None)
    return plain
