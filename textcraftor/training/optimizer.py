"""The optimiser of a run and its learning rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from textcraftor.config import TuneConfig
from textcraftor.models.negative_embedding import NegativeEmbedding


def adamw(module: nn.Module, tune: TuneConfig, negative_learning_rate: float) -> torch.optim.AdamW:
    """AdamW over a module's trained parameters, in the module's order; a negative embedding has its own learning rate."""
    negative = {id(p) for m in module.modules() if isinstance(m, NegativeEmbedding) for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in negative], "lr": tune.learning_rate},
        {"params": [p for p in trained if id(p) in negative], "lr": negative_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=tune.weight_decay)


def allocate_moments(optimizer: torch.optim.AdamW) -> None:
    """Allocate the state that AdamW would allocate in its first step, with the same values.

    Allocated before the first backward pass, the moments are part of its memory: too little memory then shows where the
    micro batch can be halved, and not in the middle of an update.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def rate_factor(tune: TuneConfig, step: int) -> float:
    """The factor of the learning rate at step index `step`: warm-up from 0, then decay to 0."""
    warm = min(1.0, (step + 1) / max(1, tune.warmup_steps))
    left = 1 - max(0, step - tune.warmup_steps) / max(1, tune.steps - tune.warmup_steps)
    decay = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return warm * decay[tune.decay]
