"""A diffusers scheduler as a pure function: what it remembers between steps is an argument and a result.

diffusers keeps the step index and a multistep solver's history inside the scheduler object. There it would be lost at
the cached prefix, and moved twice when gradient checkpointing computes a step again. Here nothing is kept: the same
arguments give the same result, in any order, any number of times.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from textcraftor.config import ChainConfig
from textcraftor.errors import ConfigError

Memory = tuple[Tensor, ...]
"""What a multistep solver carries from step to step, oldest first, each (B, C, h, w); () for the others."""

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}

FORCED: dict[str, dict[str, Any]] = {
    "dpmsolver": {"algorithm_type": "dpmsolver++"},  # the sde variants draw noise, the others are deprecated
    "pndm": {"skip_prk_steps": True},  # as every Stable Diffusion does; Runge-Kutta would cost nine more UNet calls
}
"""What `chain.scheduler` means, whatever the base's own scheduler says."""

ABSENT: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
"""What holds where the base's scheduler, being of another class, has no word on it: latents are not bound by 1."""


class Solver:
    """The steps of one chain. Noise schedule, prediction type and spacing are the base's, the solver is the chain's."""

    def __init__(self, chain: ChainConfig, scheduler_config: Mapping[str, Any], device: torch.device):
        self.name = chain.scheduler
        self.num_inference_steps = chain.num_inference_steps
        settings = {**ABSENT, **scheduler_config, **FORCED.get(chain.scheduler, {})}
        self._scheduler = SCHEDULERS[chain.scheduler].from_config(settings)
        longest = self._scheduler.config.num_train_timesteps
        if chain.num_inference_steps > longest:
            raise ConfigError(f"chain.num_inference_steps = {chain.num_inference_steps} is more than the base's {longest}")
        # The scheduler's own copy stays on the CPU, where looking up a coefficient never waits for a GPU.
        self._scheduler.set_timesteps(chain.num_inference_steps)
        self.timesteps = self._scheduler.timesteps.to(device)
        self._extra = len(self.timesteps) - chain.num_inference_steps
        self._depth = {"dpmsolver": self._scheduler.config.get("solver_order", 1) - 1, "pndm": 3}.get(chain.scheduler, 0)

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of z_T."""
        return self._scheduler.init_noise_sigma

    def evaluations(self, step_index: int) -> range:
        """The UNet calls of one step, as places in `timesteps`: one, but PNDM's first step takes two."""
        first = step_index + self._extra if step_index else 0
        return range(first, step_index + self._extra + 1)

    def memory_at(self, step_index: int) -> int:
        """How many tensors the memory holds before a step."""
        return min(step_index, self._depth)

    def scale(self, latents: Tensor, place: int) -> Tensor:
        """Latents as the UNet expects them at this place of `timesteps` (only Euler's are scaled)."""
        return self._at(place).scale_model_input(latents, self._scheduler.timesteps[place])

    def step(self, noise_pred: Tensor, place: int, latents: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """(B, C, h, w) at the next place of `timesteps`, and what to remember there. Differentiable."""
        scheduler = self._at(place)
        timestep = self._scheduler.timesteps[place]
        if self.name == "dpmsolver":
            order = scheduler.config.solver_order
            scheduler.model_outputs = [*[None] * (order - len(memory)), *memory]
            scheduler.lower_order_nums = min(place, order)
            after = scheduler.step(noise_pred, timestep, latents).prev_sample
            return after, tuple(scheduler.model_outputs[order - self.memory_at(place + 1) :])
        if self.name == "pndm":
            # The two calls of the first step share the sample they start from: there, it is remembered too.
            scheduler.counter = place
            scheduler.ets = list(memory[:1] if place == 1 else memory)
            scheduler.cur_sample = memory[1] if place == 1 else None
            after = scheduler.step(noise_pred, timestep, latents).prev_sample
            return after, (*scheduler.ets[-self._depth :], *([latents] if place == 0 else []))
        return scheduler.step(noise_pred, timestep, latents).prev_sample, ()

    def pack(self, latents: Tensor, memory: Memory) -> Tensor:
        """Latents and memory as one tensor, (B, (1 + len(memory)) * C, h, w): what a cached prefix is made of."""
        return torch.cat([latents, *memory], dim=1) if memory else latents

    def unpack(self, packed: Tensor, step_index: int) -> tuple[Tensor, Memory]:
        """The inverse of `pack`, for the state before a step."""
        latents, *memory = packed.chunk(1 + self.memory_at(step_index), dim=1)
        return latents, tuple(memory)

    def _at(self, place: int) -> Any:
        """A scheduler that stands at this place; a shallow copy, so that the original never moves."""
        scheduler = copy.copy(self._scheduler)
        scheduler._step_index = place
        return scheduler
