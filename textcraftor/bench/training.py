"""`textcraftor bench train`: our training step against a plain loop with the published code's semantics, in one run.

Same weights, prompts and noise. The gradients are compared first: speed counts only where they agree.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textcraftor.bench.meters import counted, peak_bytes, resident_bytes, seconds, spread, unwanted_bytes
from textcraftor.bench.reference import PlainLoop
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, TuneConfig
from textcraftor.errors import ConfigError, unknown
from textcraftor.kernels import derived_bytes, economise
from textcraftor.models.base import Base, TunedModel, load_base
from textcraftor.rewards import Reward, RewardMix, load_rewards
from textcraftor.tiny.language import sample_prompts
from textcraftor.training.acceleration import accelerate
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective

TURNS = ("reference", "cached", "inline")
SETTINGS = (
    "grad_steps",
    "decode_size",
    "gradient_checkpointing",
    "channels_last",
    "frozen_kernels",
    "compile",
    "activation_budget",
)


class Contest:
    """Both steps on the same models; whose turn it is decides what requires a gradient."""

    def __init__(self, config: Config, mix: str, micro_batch: int | None, device: torch.device) -> None:
        if mix not in config.mix:
            raise ConfigError(unknown("mix", mix, config.mix))
        if config.chain.scheduler != "ddim" or config.train.gradient != "truncated":
            raise ConfigError("The published code knows DDIM and truncated gradients alone: bench with those")
        self.device, self.size, self.tune = device, config.train.batch_size, config.train
        self.micro_batch = micro_batch or self.size
        if self.size % self.micro_batch:
            raise ConfigError(f"--micro-batch {micro_batch} does not divide train.batch_size = {self.size}")
        self.weights = {name: weight for name, weight in config.mix[mix].items() if weight}
        self.base: Base = load_base(config.base, device)
        self.rewards: dict[str, Reward] = load_rewards(config.rewards, self.weights, device, self.tune.reward_dtype)
        self.encoder = self.base.trainable("text_encoder")
        self.prompts = sample_prompts(self.size, 0, 0.6)
        chain = config.train_chain
        self.sampler = Sampler(self.base, chain, 1 - self.tune.grad_steps / chain.num_inference_steps)
        self.noise = self.sampler.noise(range(self.size))
        self.plain = PlainLoop(self.base.pipe, self.encoder, self.rewards, self.weights, chain, self.tune.grad_steps)
        self.objective = Objective(self.base, self.sampler, RewardMix(self.rewards, self.weights), self.tune)
        if self.tune.frozen_kernels:  # of weights without a gradient; where the reference wants one, they are torch's own
            for module in self.plain.modules:
                economise(module)
        self.cached = self._prepare()

    def turn(self, name: str) -> Callable[[], None]:
        """The step of `reference`, `cached` or `inline`, to be called now: models set as it wants them, no gradients."""
        theirs = name == "reference"
        self.encoder.zero_grad(set_to_none=True)  # the published code zeroes no other module's, which stay in memory
        for module in self.plain.modules:
            module.requires_grad_(theirs)
        form = torch.channels_last if self.tune.channels_last and not theirs else torch.contiguous_format
        for module in (self.base.pipe.unet, self.base.pipe.vae):
            module.to(memory_format=form)
        steps: dict[str, Callable[[], None]] = {
            "reference": lambda: self.plain.step(self.prompts, self.noise),
            "cached": lambda: self._ours(self.cached),
            "inline": lambda: self._ours(self._prepare()),
        }
        return steps[name]

    def gradient(self) -> list[Tensor]:
        """What the last step left in the encoder, tensor by tensor."""
        return [p.grad.clone() for p in self.encoder.parameters() if p.grad is not None]

    def stages(self) -> dict[str, float]:
        """Seconds of the parts of our step: the chain is the rest of it."""
        self.turn("cached")
        tuned = TunedModel(self.encoder)
        with torch.no_grad():
            latents = self.sampler.finish(self.cached.latents, self.base.conditioning(self.prompts, tuned))
        parts: dict[str, Callable[[], object]] = {
            "prepare": self._prepare,
            "text_encoder_forward": lambda: self.base.conditioning(self.prompts, tuned),
            "decode_and_rewards": lambda: self.objective._score(latents, self.cached, 1.0),
            "step_cached": lambda: self._ours(self.cached),
        }
        return {name: round(seconds(part, self.device)[0], 4) for name, part in parts.items()}

    def resident(self) -> tuple[int, int]:
        """Bytes held between steps by (the reference, ours): weights and what is kept of them; unwanted gradients.

        Ends the contest: ours drops the rewards' text towers.
        """
        pipe: list[nn.Module] = [self.base.pipe.unet, self.base.pipe.vae, self.base.text_encoder, self.encoder]
        theirs = resident_bytes([*pipe, *self.rewards.values()]) + unwanted_bytes(self.plain.modules)
        for reward in self.rewards.values():
            reward.drop_text_tower()
        return theirs, resident_bytes([*pipe, *self.rewards.values()]) + derived_bytes(self.plain.modules)

    def _ours(self, batch: Batch) -> None:
        tuned = TunedModel(self.encoder)
        for start in range(0, self.size, self.micro_batch):
            part = batch.part(start, start + self.micro_batch)
            self.objective.backward(part, tuned, 0, self.micro_batch / self.size)

    def _prepare(self) -> Batch:
        prefix = self.sampler.prefix(self.prompts, range(self.size))
        features = {name: reward.text_features(self.prompts) for name, reward in self.rewards.items()}
        return Batch(self.prompts, prefix, features)


def bench_training(
    config: Config,
    mix: str,
    device: torch.device,
    repeats: int = 8,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Ratios of our training step to the published code's, and what they are made of.

    micro_batch: samples of ours that hold a graph at a time; the reference takes `train.batch_size` at once.
    What `train` says of memory and speed (SETTINGS) is for ours alone.
    Speeds are of the best of `repeats` rounds in which all take turns. `processor_ratio` compares processor seconds on
    the CPU: it says the same on a quiet machine, and still says something on a busy one.
    """
    train: TuneConfig = config.train
    contest = Contest(config, mix, micro_batch, device)
    gradients, work, peaks = {}, {}, {}
    for name in TURNS:
        step = contest.turn(name)
        with counted(contest.base.pipe.unet, contest.size) as work[name]:
            step()
        gradients[name] = contest.gradient()
        peaks[name] = peak_bytes(contest.turn(name), device)
    differences = [spread(zip(gradients[name], gradients["reference"], strict=True)) for name in ("cached", "inline")]
    if train.compile:  # counting hooks and torch.compile do not go together: it comes after
        accelerate(contest.sampler, [], [], train)
        contest.turn("cached")()
        differences.append(spread(zip(contest.gradient(), gradients["reference"], strict=True)))
        peaks["cached"] = peak_bytes(contest.turn("cached"), device)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in TURNS}
    for _ in range(repeats):
        for name in TURNS:
            taken[name].append(seconds(contest.turn(name), device))
    stages = contest.stages()
    theirs, ours = contest.resident()
    wall, processor = ({name: min(pair[i] for pair in pairs) for name, pairs in taken.items()} for i in (0, 1))
    return {
        "speed_ratio_cached": wall["reference"] / wall["cached"],
        "speed_ratio_inline": wall["reference"] / wall["inline"],
        "memory_ratio": (peaks["cached"] + ours) / (peaks["reference"] + theirs),
        "gradient_max_rel_diff": max(differences),
        "unet_forwards_reference": sum(work["reference"].values()),
        "unet_forwards_ours": sum(work["cached"].values()),
        "unet_forwards_ours_inline": sum(work["inline"].values()),
        "images_per_second": {name: contest.size / value for name, value in wall.items()},
        "processor_ratio_cached": processor["reference"] / processor["cached"],
        "processor_ratio_inline": processor["reference"] / processor["inline"],
        "seconds": {name: [round(pair[0], 4) for pair in pairs] for name, pairs in taken.items()},
        "processor_seconds": {name: [round(pair[1], 4) for pair in pairs] for name, pairs in taken.items()},
        "stage_seconds": stages,
        "peak_bytes": {"reference": peaks["reference"] + theirs, "ours": peaks["cached"] + ours},
        "settings": {
            "profile": config.profile,
            "mix": mix,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": config.base.dtype,
            "batch_size": contest.size,
            "micro_batch": contest.micro_batch,
            **{name: getattr(train, name) for name in SETTINGS},
            "repeats": repeats,
        },
    }
