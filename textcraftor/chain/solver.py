"""A diffusers scheduler as a pure function: the history it keeps between steps is an argument and a result.

diffusers keeps the step index and a multistep solver's history inside the scheduler object. That state would be lost at
the cached prefix, and advanced twice when gradient checkpointing recomputes a step. A `Solver` keeps none: the same
arguments give the same result, in any order, any number of times.

Which attributes of a scheduler are history is found by running the chain once on a small probe tensor. So any scheduler of
diffusers works that gives the same result when run twice: attributes with tensors of the latents' shape are history, and
all other attributes depend only on the index of the UNet call.
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

History = tuple[Tensor, ...]
"""Tensors that a multistep solver carries from one UNet call to the next, each (B, C, h, w); () for one-step solvers."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
"""Short names. Any other scheduler is given by its class name in diffusers."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "dpmsolver": {"algorithm_type": "dpmsolver++"},  # the sde variants draw noise, the others are deprecated
    "pndm": {"skip_prk_steps": True},  # as every Stable Diffusion does; the Runge-Kutta steps would cost nine more UNet calls
}
"""Settings that a short name fixes, whatever the base's scheduler config says."""

DESCHEDULER_ERRORS: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
"""Settings used where the base's scheduler config, of another class, lacks them: latents are not limited to [-1, 1]."""

SCHEDULER_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError, KeyError, ImportError)
"""Exceptions of a scheduler that does not fit the base or the chain."""

PROBE_SHAPE = (1, 1, 2, 3)  # no coefficient of a scheduler has this shape


@dataclass(frozen=True)
class SchedulerState:
    """The attributes of a scheduler that change along the chain, as they are before one UNet call.

    leaves, spec: the attributes, flattened as a pytree.  slots: for each tensor of the history, the indices of the leaves
    that hold it.  unused: indices of leaves with a tensor that affects no later result.
    """

    spec: TreeSpec
    leaves: list[Any]
    slots: list[list[int]]
    unused: list[int]

    def attributes(self, history: History, latents: Tensor) -> dict[str, Any]:
        """The attributes with this history in them. Unused leaves get `latents`, which only has the right shape."""
        leaves = list(self.leaves)
        for slot, tensor in zip([*self.slots, self.unused], [*history, latents], strict=True):
            for leaf in slot:
                leaves[leaf] = tensor
        return cast(dict[str, Any], tree_unflatten(leaves, self.spec))

    def with_slots(self, numbers: list[int]) -> "SchedulerState":
        """The same state with only these slots as history; the leaves of the others become unused."""
        dropped = [leaf for number, slot in enumerate(self.slots) if number not in numbers for leaf in slot]
        kept = [self.slots[number] for number in numbers]
        return SchedulerState(self.spec, self.leaves, kept, [*self.unused, *dropped])

    def history(self, attributes: Mapping[str, Any]) -> History:
        """The history in the attributes of a scheduler that is in this state; the inverse of `attributes`."""
        leaves = tree_leaves({name: attributes[name] for name in tree_unflatten(self.leaves, self.spec)})
        return tuple(leaves[slot[0]] for slot in self.slots)


class Solver:
    """The steps of one chain. Noise schedule, prediction type and timestep spacing come from the base, the solver from `chain`.

    A step makes one UNet call with most schedulers. `call` is the index of a UNet call in `timesteps`.
    Raises ConfigError for a scheduler that diffusers lacks, that does not fit the base, or that draws noise.
    """

    def __init__(self, chain: ChainConfig, scheduler_config: Mapping[str, Any], device: torch.device):
        self.name = chain.scheduler
        self._scheduler = make_scheduler(chain, scheduler_config)
        self.timesteps = self._scheduler.timesteps.to(device)
        self._extra = max(0, len(self.timesteps) - chain.num_inference_steps * self._scheduler.order)
        self._states = self._trace_states()
        # Backwards from the end, where no history is needed: a tensor is kept only if it affects something later.
        self._states[-1] = self._states[-1].with_slots([])
        for call in reversed(range(len(self.timesteps))):
            slots = range(len(self._states[call].slots))
            self._states[call] = self._states[call].with_slots([slot for slot in slots if self._affects_later(call, slot)])

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of z_T."""
        return self._scheduler.init_noise_sigma

    def unet_calls(self, step_index: int) -> range:
        """The UNet calls of one step: one, but two in PNDM's first step and in each of Heun's."""
        order = self._scheduler.order
        first = step_index * order + self._extra if step_index else 0
        return range(first, min((step_index + 1) * order + self._extra, len(self.timesteps)))

    def history_length(self, step_index: int) -> int:
        """Number of tensors in the history before a step."""
        return len(self._states[self.unet_calls(step_index).start].slots)

    def scale(self, latents: Tensor, call: int) -> Tensor:
        """Latents scaled as the UNet expects them at this call (unchanged for DDIM and most others)."""
        scheduler = self._scheduler_before(call, latents, (latents,) * len(self._states[call].slots))
        return scheduler.scale_model_input(latents, self._scheduler.timesteps[call])

    def step(self, noise_pred: Tensor, call: int, latents: Tensor, history: History) -> tuple[Tensor, History]:
        """Latents (B, C, h, w) and history before the next UNet call. Differentiable."""
        scheduler = self._scheduler_before(call, latents, history)
        after = scheduler.step(noise_pred, self._scheduler.timesteps[call], latents).prev_sample
        return after, self._states[call + 1].history(vars(scheduler))

    def predict_original(self, noise_pred: Tensor, call: int, latents: Tensor) -> Tensor:
        """z_0 as the UNet predicts it at this call, (B, C, h, w). Differentiable.

        The UNet sees `scale(latents)` = (z_0 + sigma * noise) / sqrt(1 + sigma^2), whatever the scheduler. Between two of
        the timesteps that the UNet was trained on, sigma is interpolated.
        """
        scheduler, scaled = self._scheduler, self.scale(latents, call)
        signals = scheduler.alphas_cumprod.double().numpy()
        sigma = float(np.interp(float(scheduler.timesteps[call]), np.arange(len(signals)), np.sqrt(1 / signals - 1)))
        signal, noise = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        if scheduler.config.prediction_type == "sample":
            return noise_pred
        if scheduler.config.prediction_type == "v_prediction":
            return signal * scaled - noise * noise_pred
        return (scaled - noise * noise_pred) / signal

    def pack(self, latents: Tensor, history: History) -> Tensor:
        """Latents and history as one tensor, (B, (1 + len(history)) * C, h, w): a cached prefix."""
        return torch.cat([latents, *history], dim=1) if history else latents

    def unpack(self, packed: Tensor, step_index: int) -> tuple[Tensor, History]:
        """Latents and history before a step; the inverse of `pack`."""
        latents, *history = packed.chunk(1 + self.history_length(step_index), dim=1)
        return latents, tuple(history)

    def _scheduler_before(self, call: int, latents: Tensor, history: History) -> Any:
        """A scheduler in its state before this call; a shallow copy, so the original never changes."""
        scheduler = copy.copy(self._scheduler)
        vars(scheduler).update(self._states[call].attributes(history, latents))
        return scheduler

    def _trace_states(self) -> list[SchedulerState]:
        """The scheduler's state before each UNet call and after the last, from running the chain on a probe tensor."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                states, sample = self._run_probe()
                torch.manual_seed(1)
                _, again = self._run_probe()
        except SCHEDULER_ERRORS as error:
            raise ConfigError(f"chain.scheduler = {self.name} cannot run this base's chain: {brief(error)}") from None
        if not sample.isfinite().all():
            raise ConfigError(self._overflow())
        if not torch.equal(sample, again):
            raise ConfigError(
                f"chain.scheduler = {self.name} draws noise at its steps, so a prompt and its seed would not give the same "
                f"image twice. Allowed: {', '.join(SCHEDULERS)}, or another class of diffusers that draws none"
            )
        return states

    def _overflow(self) -> str:
        """Why the chain on the probe tensor ends in values that are not finite."""
        settings = self._scheduler.config
        if settings.get("rescale_betas_zero_snr") and settings.get("prediction_type") == "epsilon":
            return (
                "The base's scheduler_config.json has zero terminal SNR (rescale_betas_zero_snr) with prediction_type epsilon: "
                "the first latents are noise alone, and nothing can be divided out of noise. Such bases predict the velocity: "
                "set prediction_type to v_prediction there, or rescale_betas_zero_snr to false if the base was trained without"
            )
        return f"chain.scheduler = {self.name} computes values that are not finite with this base's noise schedule"

    def _run_probe(self) -> tuple[list[SchedulerState], Tensor]:
        scheduler, sample = copy.deepcopy(self._scheduler), torch.ones(PROBE_SHAPE)
        initial, states = dict(vars(scheduler)), []
        for timestep in self._scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            states.append(_changing_state(scheduler, initial))
            sample = scheduler.step(model_input / 2, timestep, sample).prev_sample
        return [*states, _changing_state(scheduler, initial)], sample

    def _affects_later(self, call: int, slot: int) -> bool:
        """Whether a tensor of the history affects any later latents, which a NaN in its place shows."""
        state, ones = self._states[call], torch.ones(PROBE_SHAPE)
        history = tuple(ones * (math.nan if number == slot else 1) for number in range(len(state.slots)))
        after, history_after = self.step(ones, call, ones, history)
        return any(bool(tensor.isnan().any()) for tensor in (after, *history_after))


def step_of_call(call: int, calls: int, num_inference_steps: int, order: int) -> int:
    """The step that a UNet call of a chain belongs to; the inverse of `Solver.unet_calls`."""
    extra = max(0, calls - num_inference_steps * order)
    return max(0, call - extra) // order


def make_scheduler(chain: ChainConfig, scheduler_config: Mapping[str, Any]) -> Any:
    """The chain's scheduler with the base's noise schedule and its timesteps set.

    It stays on the CPU, so that looking up a coefficient never waits for a GPU.
    """
    cls = getattr(diffusers, SCHEDULERS.get(chain.scheduler, chain.scheduler), None)
    if cls is None:
        raise ConfigError(
            f"chain.scheduler = {chain.scheduler}: diffusers has no such scheduler. Allowed: {', '.join(SCHEDULERS)}, or a "
            "class such as UniPCMultistepScheduler"
        )
    try:
        scheduler = cls.from_config({**DESCHEDULER_ERRORS, **scheduler_config, **OVERRIDES.get(chain.scheduler, {})})
        max_steps = scheduler.config.num_train_timesteps
        if chain.num_inference_steps > max_steps:
            raise ConfigError(f"chain.num_inference_steps = {chain.num_inference_steps} is more than the base's {max_steps}")
        scheduler.set_timesteps(chain.num_inference_steps)
        if "beta_schedule" not in signature(cls).parameters or not scheduler.init_noise_sigma or not scheduler.order:
            raise ConfigError(f"chain.scheduler = {chain.scheduler} has a noise schedule of its own, not the base's")
        if scheduler.timesteps[0] < scheduler.timesteps[-1]:
            raise ConfigError(f"chain.scheduler = {chain.scheduler} goes from the image to the noise, not back")
    except SCHEDULER_ERRORS as error:
        raise ConfigError(f"chain.scheduler = {chain.scheduler} does not fit this base: {brief(error)}") from None
    return scheduler


def _changing_state(scheduler: Any, initial: Mapping[str, Any]) -> SchedulerState:
    """The attributes that differ from `initial`, those after `set_timesteps`; and all lists, which change in place."""
    changing = {
        name: value for name, value in vars(scheduler).items() if isinstance(value, list) or value is not initial.get(name)
    }
    leaves, spec = tree_flatten(changing)
    slots: dict[int, list[int]] = {}  # by tensor: one may be kept under several names
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape == PROBE_SHAPE:
            slots.setdefault(id(leaf), []).append(number)
    return SchedulerState(spec, leaves, list(slots.values()), [])
