"""`textcraftor bench train`: our training step against a plain loop with the published code's semantics, in one run.

Both use the same weights, prompts and noise. The gradients are compared first: speed counts only where they agree.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textcraftor.bench.meters import (
    count_unet_work,
    gradient_bytes,
    largest_relative_difference,
    peak_bytes,
    resident_bytes,
    seconds,
)
from textcraftor.bench.reference import ReferenceLoop
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, TuneConfig
from textcraftor.errors import ConfigError, unknown
from textcraftor.models.base import Base, TunedModel, load_base
from textcraftor.models.selective_checkpointing import disable_selective_checkpointing, enable_selective_checkpointing
from textcraftor.rewards import Reward, RewardMix, load_rewards
from textcraftor.tiny.language import sample_prompts
from textcraftor.training.acceleration import accelerate
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective

STEPS = ("reference", "cached", "inline")
SETTINGS = (
    "grad_steps",
    "decode_size",
    "gradient_checkpointing",
    "channels_last",
    "selective_checkpointing",
    "compile",
    "activation_budget",
)
"""Settings of `train` that change the memory or speed of our step."""


class StepComparison:
    """The reference step and ours on the same models. `prepare` decides which parameters require a gradient."""

    def __init__(self, config: Config, mix: str, micro_batch: int | None, device: torch.device) -> None:
        if mix not in config.mix:
            raise ConfigError(unknown("mix", mix, config.mix))
        if config.chain.scheduler != "ddim":
            raise ConfigError(
                f"The published code supports only DDIM, and chain.scheduler is {config.chain.scheduler}. Set it to ddim"
            )
        # The published code has one gradient, through the last steps; ours of the same kind is compared with it.
        tune = config.train.model_copy(update={"gradient": "truncated"})
        self.device, self.batch_size, self.tune = device, tune.batch_size, tune
        self.micro_batch = micro_batch or self.batch_size
        if self.batch_size % self.micro_batch:
            raise ConfigError(f"--micro-batch {micro_batch} does not divide train.batch_size = {self.batch_size}")
        self.weights = {name: weight for name, weight in config.mix[mix].items() if weight}
        self.base: Base = load_base(config.base, device)
        self.rewards: dict[str, Reward] = load_rewards(config.rewards, self.weights, device, self.tune.reward_dtype)
        self.encoder = self.base.trainable("text_encoder")
        self.prompts = sample_prompts(self.batch_size, 0, 0.6)
        chain = config.train_chain
        self.sampler = Sampler(self.base, chain, 1 - self.tune.grad_steps / chain.num_inference_steps)
        self.noise = self.sampler.noise(range(self.batch_size))
        self.reference = ReferenceLoop(self.base.pipe, self.encoder, self.rewards, self.weights, chain, self.tune.grad_steps)
        self.objective = Objective(self.base, self.sampler, RewardMix(self.rewards, self.weights), self.tune)
        self.cached_batch = self._compute_batch()

    def prepare(self, name: str) -> Callable[[], None]:
        """Set the models up for the step `reference`, `cached` or `inline` and return it, to be called now."""
        is_reference = name == "reference"
        self.encoder.zero_grad(set_to_none=True)  # the published code zeroes no other module's, which stay in memory
        for module in self.reference.modules:
            module.requires_grad_(is_reference)
        channels_last = self.tune.channels_last and not is_reference
        for module in (self.base.pipe.unet, self.base.pipe.vae):
            module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            if self.tune.selective_checkpointing and not is_reference:
                enable_selective_checkpointing(module)
            else:
                disable_selective_checkpointing(module)
        steps: dict[str, Callable[[], None]] = {
            "reference": lambda: self.reference.step(self.prompts, self.noise),
            "cached": lambda: self._step(self.cached_batch),
            "inline": lambda: self._step(self._compute_batch()),
        }
        return steps[name]

    def encoder_gradient(self) -> list[Tensor]:
        """The gradient that the last step left in the encoder, tensor by tensor."""
        return [p.grad.clone() for p in self.encoder.parameters() if p.grad is not None]

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of the parts of our step. What they leave of `step_cached` is the denoising chain."""
        self.prepare("cached")
        tuned = TunedModel(self.encoder)
        with torch.no_grad():
            latents = self.sampler.finish(self.cached_batch.latents, self.base.conditioning(self.prompts, tuned))
        parts: dict[str, Callable[[], object]] = {
            "prepare": self._compute_batch,
            "text_encoder_forward": lambda: self.base.conditioning(self.prompts, tuned),
            "decode_and_rewards": lambda: self.objective._score(latents, self.cached_batch, 1.0),
            "step_cached": lambda: self._step(self.cached_batch),
        }
        return {name: round(seconds(part, self.device)[0], 4) for name, part in parts.items()}

    def bytes_between_steps(self) -> tuple[int, int]:
        """Bytes held between steps by (the reference, our step): weights, and for the reference unused gradients.

        Call it last: our step drops the rewards' text towers.
        """
        pipe: list[nn.Module] = [self.base.pipe.unet, self.base.pipe.vae, self.base.text_encoder, self.encoder]
        theirs = resident_bytes([*pipe, *self.rewards.values()]) + gradient_bytes(self.reference.modules)
        for reward in self.rewards.values():
            reward.drop_text_tower()
        return theirs, resident_bytes([*pipe, *self.rewards.values()])

    def _step(self, batch: Batch) -> None:
        tuned = TunedModel(self.encoder)
        for start in range(0, self.batch_size, self.micro_batch):
            part = batch.part(start, start + self.micro_batch)
            self.objective.backward(part, tuned, 0, self.micro_batch / self.batch_size)

    def _compute_batch(self) -> Batch:
        """What `textcraftor prepare` would store for the prompts: prefix latents and text features."""
        prefix = self.sampler.prefix(self.prompts, range(self.batch_size))
        features = {name: reward.text_features(self.prompts) for name, reward in self.rewards.items()}
        return Batch(self.prompts, prefix, features)


def paired_ratios(reference: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum over the rounds of reference / ours, each ratio taken within one round.

    Both are timed side by side in a round, so what else the machine does slows both, and the ratio moves little.
    """
    ratios = [theirs / own for theirs, own in zip(reference, ours, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def bench_training(
    config: Config,
    mix: str,
    device: torch.device,
    repeats: int = 8,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Compare our training step with the published code's: speed, memory, gradient, UNet work.

    repeats: rounds. Each times the reference, our step from the cache and our step without it, one after another.
    micro_batch: samples for which our step holds activations at a time; the reference takes `train.batch_size` at once.
    The settings of `train` in SETTINGS apply to our step alone.
    `speed_ratio_*` and `processor_ratio_*` are medians of the ratio within each round (`paired_ratios`), by wall clock
    and by the CPU seconds of the process; `*_range` holds minimum and maximum.
    """
    train: TuneConfig = config.train
    comparison = StepComparison(config, mix, micro_batch, device)
    gradients, work, peaks = {}, {}, {}
    for name in STEPS:
        step = comparison.prepare(name)
        with count_unet_work(comparison.base.pipe.unet, comparison.batch_size) as work[name]:
            step()
        gradients[name] = comparison.encoder_gradient()
        peaks[name] = peak_bytes(comparison.prepare(name), device)
    differences = [
        largest_relative_difference(zip(gradients[name], gradients["reference"], strict=True)) for name in ("cached", "inline")
    ]
    if train.compile:  # torch.compile does not work with the hooks that count, so it comes after them
        accelerate(comparison.sampler, [], train)
        comparison.prepare("cached")()
        differences.append(largest_relative_difference(zip(comparison.encoder_gradient(), gradients["reference"], strict=True)))
        peaks["cached"] = peak_bytes(comparison.prepare("cached"), device)
    wall: dict[str, list[float]] = {name: [] for name in STEPS}
    processor: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(repeats):
        for name in STEPS:
            elapsed, worked = seconds(comparison.prepare(name), device)
            wall[name].append(elapsed)
            processor[name].append(worked)
    ratios = {
        f"{kind}_ratio_{name}": paired_ratios(times["reference"], times[name])
        for kind, times in (("speed", wall), ("processor", processor))
        for name in ("cached", "inline")
    }
    stages = comparison.stage_seconds()
    theirs, ours = comparison.bytes_between_steps()
    return {
        **{name: ratio["median"] for name, ratio in ratios.items()},
        **{f"{name}_range": [ratio["min"], ratio["max"]] for name, ratio in ratios.items()},
        "memory_ratio": (peaks["cached"] + ours) / (peaks["reference"] + theirs),
        "gradient_max_rel_diff": max(differences),
        "unet_forwards_reference": sum(work["reference"].values()),
        "unet_forwards_ours": sum(work["cached"].values()),
        "unet_forwards_ours_inline": sum(work["inline"].values()),
        "images_per_second": {name: comparison.batch_size / statistics.median(times) for name, times in wall.items()},
        "seconds": {name: [round(value, 4) for value in times] for name, times in wall.items()},
        "processor_seconds": {name: [round(value, 4) for value in times] for name, times in processor.items()},
        "stage_seconds": stages,
        "peak_bytes": {"reference": peaks["reference"] + theirs, "ours": peaks["cached"] + ours},
        "settings": {
            "profile": config.profile,
            "mix": mix,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": config.base.dtype,
            "batch_size": comparison.batch_size,
            "micro_batch": comparison.micro_batch,
            **{name: getattr(train, name) for name in SETTINGS},
            "repeats": repeats,
        },
    }
