"""Faster kernels for the same step: memory format, frozen layers, torch.compile. None changes more than rounding."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch._functorch.config as partitioner
from torch import Tensor, nn

from textcraftor.chain.sampler import Sampler
from textcraftor.config import TuneConfig
from textcraftor.kernels import economise


def accelerate(sampler: Sampler, modules: Iterable[nn.Module], rewards: Iterable[nn.Module], tune: TuneConfig) -> None:
    """Apply what `tune` asks for to a sampler, the UNets and the VAE that it will be called with, and the rewards."""
    for module in modules:
        if tune.channels_last:
            cast(Any, module).to(memory_format=torch.channels_last)
        if tune.frozen_kernels:
            economise(module)
    for reward in rewards:
        if tune.frozen_kernels:
            economise(reward)
    if tune.compile:
        partitioner.activation_memory_budget = tune.activation_budget
        sampler.call_unet = Compiled(sampler.call_unet)
        sampler.call_decoder = Compiled(sampler.call_decoder)


class Compiled:
    """A function, compiled where gradient is carried; prefixes and sample grids have other shapes and are few."""

    def __init__(self, function: Any) -> None:
        self.plain, self.compiled = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Any) -> Tensor:
        return cast(Tensor, (self.compiled if torch.is_grad_enabled() else self.plain)(*arguments))
