"""A diffusers scheduler as a pure function: what it remembers between steps is an argument and a result.

diffusers keeps the step index and a multistep solver's history inside the scheduler object. There it would be lost at
the cached prefix, and moved twice when gradient checkpointing computes a step again. Here nothing is kept: the same
arguments give the same result, in any order, any number of times.

What a scheduler remembers is found by a rehearsal of the chain on a few zeros, so any of diffusers' will do that can be
run again with the same result: of its attributes after each call, tensors of the latents' shape are memory, and all
else depends on the place alone.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from textcraftor.config import ChainConfig
from textcraftor.errors import ConfigError
from textcraftor.models.weights import brief

Memory = tuple[Tensor, ...]
"""What a solver carries from one UNet call to the next, each (B, C, h, w); () for those of one step."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
"""Short names; any other scheduler goes by its class in diffusers."""

FORCED: dict[str, dict[str, Any]] = {
    "dpmsolver": {"algorithm_type": "dpmsolver++"},  # the sde variants draw noise, the others are deprecated
    "pndm": {"skip_prk_steps": True},  # as every Stable Diffusion does; Runge-Kutta would cost nine more UNet calls
}
"""What a short name means, whatever the base's own scheduler says."""

ABSENT: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
"""What holds where the base's scheduler, being of another class, has no word on it: latents are not bound by 1."""

FAULTS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError, KeyError, ImportError)
"""What a scheduler raises that was made for something else."""

REHEARSED = (1, 1, 2, 3)  # a shape that no coefficient of a scheduler has


@dataclass(frozen=True)
class State:
    """What a scheduler's attributes hold before a UNet call.

    leaves: of `spec`, its attributes that change.  slots: for each tensor of memory, the leaves where it belongs.
    unread: leaves with a tensor that no later result depends on.
    """

    spec: TreeSpec
    leaves: list[Any]
    slots: list[list[int]]
    unread: list[int]

    def attributes(self, memory: Memory, latents: Tensor) -> dict[str, Any]:
        """The attributes with this memory in its place; what is never read may be anything of the right shape."""
        leaves = list(self.leaves)
        for slot, tensor in zip([*self.slots, self.unread], [*memory, latents], strict=True):
            for leaf in slot:
                leaves[leaf] = tensor
        return cast(dict[str, Any], tree_unflatten(leaves, self.spec))

    def keeping(self, slots: list[int]) -> "State":
        """The same, with the memory in these slots alone."""
        dropped = [leaf for number, slot in enumerate(self.slots) if number not in slots for leaf in slot]
        return State(self.spec, self.leaves, [self.slots[number] for number in slots], [*self.unread, *dropped])

    def memory(self, attributes: Mapping[str, Any]) -> Memory:
        """The inverse: what a scheduler that has come here remembers."""
        leaves = tree_leaves({name: attributes[name] for name in tree_unflatten(self.leaves, self.spec)})
        return tuple(leaves[slot[0]] for slot in self.slots)


class Solver:
    """The steps of one chain. Noise schedule, prediction type and spacing are the base's, the solver is the chain's.

    Raises ConfigError for a scheduler that diffusers lacks, that does not fit the base, or that draws noise.
    """

    def __init__(self, chain: ChainConfig, scheduler_config: Mapping[str, Any], device: torch.device):
        self.name = chain.scheduler
        self._scheduler = _scheduler(chain, scheduler_config)
        self.timesteps = self._scheduler.timesteps.to(device)
        self._extra = max(0, len(self.timesteps) - chain.num_inference_steps * self._scheduler.order)
        self._states = self._rehearse()
        # From the end, where nothing is read any more: what is not read later need not be remembered.
        self._states[-1] = self._states[-1].keeping([])
        for place in reversed(range(len(self.timesteps))):
            slots = range(len(self._states[place].slots))
            self._states[place] = self._states[place].keeping([slot for slot in slots if self._read_later(place, slot)])

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of z_T."""
        return self._scheduler.init_noise_sigma

    def evaluations(self, step_index: int) -> range:
        """The UNet calls of one step, as places in `timesteps`: one, but two in PNDM's first and in each of Heun's."""
        order = self._scheduler.order
        first = step_index * order + self._extra if step_index else 0
        return range(first, min((step_index + 1) * order + self._extra, len(self.timesteps)))

    def memory_at(self, step_index: int) -> int:
        """How many tensors the memory holds before a step."""
        return len(self._states[self.evaluations(step_index).start].slots)

    def scale(self, latents: Tensor, place: int) -> Tensor:
        """Latents as the UNet expects them at this place of `timesteps` (DDIM's and most others' as they are)."""
        scheduler = self._at(place, latents, (latents,) * len(self._states[place].slots))
        return scheduler.scale_model_input(latents, self._scheduler.timesteps[place])

    def step(self, noise_pred: Tensor, place: int, latents: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """(B, C, h, w) at the next place of `timesteps`, and what to remember there. Differentiable."""
        scheduler = self._at(place, latents, memory)
        after = scheduler.step(noise_pred, self._scheduler.timesteps[place], latents).prev_sample
        return after, self._states[place + 1].memory(vars(scheduler))

    def predicted_original(self, noise_pred: Tensor, place: int, latents: Tensor) -> Tensor:
        """z_0 as the UNet predicts it at this place, (B, C, h, w). Differentiable.

        The UNet sees `scale(latents)` = (z_0 + sigma * noise) / sqrt(1 + sigma^2), whatever the scheduler; between two of
        the timesteps that it was trained on, sigma is interpolated.
        """
        scheduler, scaled = self._scheduler, self.scale(latents, place)
        signals = scheduler.alphas_cumprod.double().numpy()
        sigma = float(np.interp(float(scheduler.timesteps[place]), np.arange(len(signals)), np.sqrt(1 / signals - 1)))
        signal, noise = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        if scheduler.config.prediction_type == "sample":
            return noise_pred
        if scheduler.config.prediction_type == "v_prediction":
            return signal * scaled - noise * noise_pred
        return (scaled - noise * noise_pred) / signal

    def pack(self, latents: Tensor, memory: Memory) -> Tensor:
        """Latents and memory as one tensor, (B, (1 + len(memory)) * C, h, w): what a cached prefix is made of."""
        return torch.cat([latents, *memory], dim=1) if memory else latents

    def unpack(self, packed: Tensor, step_index: int) -> tuple[Tensor, Memory]:
        """The inverse of `pack`, for the state before a step."""
        latents, *memory = packed.chunk(1 + self.memory_at(step_index), dim=1)
        return latents, tuple(memory)

    def _at(self, place: int, latents: Tensor, memory: Memory) -> Any:
        """A scheduler that stands at this place; a shallow copy, so that the original never moves."""
        scheduler = copy.copy(self._scheduler)
        vars(scheduler).update(self._states[place].attributes(memory, latents))
        return scheduler

    def _rehearse(self) -> list[State]:
        """The state before the call at each place, and after the last."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                states, sample = self._run()
                torch.manual_seed(1)
                _, again = self._run()
        except FAULTS as error:
            raise ConfigError(f"chain.scheduler = {self.name} cannot run this base's chain: {brief(error)}") from None
        if not torch.equal(sample, again):
            raise ConfigError(
                f"chain.scheduler = {self.name} draws noise at its steps, so a prompt and its seed would not give the same "
                f"image twice. Allowed: {', '.join(SCHEDULERS)}, or another class of diffusers that draws none"
            )
        return states

    def _run(self) -> tuple[list[State], Tensor]:
        scheduler, sample = copy.deepcopy(self._scheduler), torch.ones(REHEARSED)
        given, states = dict(vars(scheduler)), []
        for timestep in self._scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            states.append(_state(scheduler, given))
            sample = scheduler.step(model_input / 2, timestep, sample).prev_sample
        return [*states, _state(scheduler, given)], sample

    def _read_later(self, place: int, slot: int) -> bool:
        """Whether what this slot holds shows in the next sample, or in what is read later."""
        state, ones = self._states[place], torch.ones(REHEARSED)
        memory = tuple(ones * (math.nan if number == slot else 1) for number in range(len(state.slots)))
        after, remembered = self.step(ones, place, ones, memory)
        return any(bool(tensor.isnan().any()) for tensor in (after, *remembered))


def _scheduler(chain: ChainConfig, scheduler_config: Mapping[str, Any]) -> Any:
    """The chain's scheduler on the base's noise schedule, its timesteps set.

    It stays on the CPU, where looking up a coefficient never waits for a GPU.
    """
    cls = getattr(diffusers, SCHEDULERS.get(chain.scheduler, chain.scheduler), None)
    if cls is None:
        raise ConfigError(
            f"chain.scheduler = {chain.scheduler}: diffusers has no such scheduler. Allowed: {', '.join(SCHEDULERS)}, or a "
            "class such as UniPCMultistepScheduler"
        )
    try:
        scheduler = cls.from_config({**ABSENT, **scheduler_config, **FORCED.get(chain.scheduler, {})})
        longest = scheduler.config.num_train_timesteps
        if chain.num_inference_steps > longest:
            raise ConfigError(f"chain.num_inference_steps = {chain.num_inference_steps} is more than the base's {longest}")
        scheduler.set_timesteps(chain.num_inference_steps)
        if "beta_schedule" not in signature(cls).parameters or not scheduler.init_noise_sigma or not scheduler.order:
            raise ConfigError(f"chain.scheduler = {chain.scheduler} has a noise schedule of its own, not the base's")
        if scheduler.timesteps[0] < scheduler.timesteps[-1]:
            raise ConfigError(f"chain.scheduler = {chain.scheduler} goes from the image to the noise, not back")
    except FAULTS as error:
        raise ConfigError(f"chain.scheduler = {chain.scheduler} does not fit this base: {brief(error)}") from None
    return scheduler


def _state(scheduler: Any, given: Mapping[str, Any]) -> State:
    """Of the attributes that are no longer what `set_timesteps` left, and of the lists, which change in place."""
    changing = {
        name: value for name, value in vars(scheduler).items() if isinstance(value, list) or value is not given.get(name)
    }
    leaves, spec = tree_flatten(changing)
    slots: dict[int, list[int]] = {}  # by tensor: one may be remembered under several names
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape == REHEARSED:
            slots.setdefault(id(leaf), []).append(number)
    return State(spec, leaves, list(slots.values()), [])
