"""Memory and speed of a training step: memory format, selective checkpointing, torch.compile. Only rounding changes."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch._functorch.config as partitioner
from torch import Tensor, nn

from textcraftor.chain.sampler import Sampler
from textcraftor.config import TuneConfig
from textcraftor.models.selective_checkpointing import enable_selective_checkpointing


def accelerate(sampler: Sampler, modules: Iterable[nn.Module], tune: TuneConfig) -> None:
    """Apply the settings of `tune` to a sampler and to the UNets and the VAE that it will be called with."""
    for module in modules:
        if tune.channels_last:
            cast(Any, module).to(memory_format=torch.channels_last)
        if tune.selective_checkpointing:
            enable_selective_checkpointing(module)
    if tune.compile:
        partitioner.activation_memory_budget = tune.activation_budget
        sampler.call_unet = Compiled(sampler.call_unet)
        sampler.call_decoder = Compiled(sampler.call_decoder)


class Compiled:
    """A function that is compiled where gradient is enabled. Prefixes and sample grids are few, and of other shapes."""

    def __init__(self, function: Any) -> None:
        self.plain, self.compiled = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Any) -> Tensor:
        return cast(Tensor, (self.compiled if torch.is_grad_enabled() else self.plain)(*arguments))
