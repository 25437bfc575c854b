"""The plan of a training run: parameters, UNet forward passes, batch, memory and time, estimated before it starts.

The estimates are made from shapes (`footprint`) and assume fused attention, activations of a whole micro batch in memory
until its backward pass, AdamW in float32, a MARGIN for allocator and kernels, and EFFICIENCY times the speed that a matrix
product reaches on this device.
"""

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from textcraftor.config import Config, TrainConfig, TuneConfig, switch_step
from textcraftor.errors import ConfigError, unknown
from textcraftor.layout import TRAIN_PROMPTS
from textcraftor.planning.footprint import Cost, Footprint, footprint

MARGIN = 1.1
OVERHEAD = 1e9  # bytes for the device's context and its libraries' workspaces
EFFICIENCY = 0.4
AVERAGE_BYTES = 4  # a parameter's moving average, and likewise the starting weights that it is interpolated with
TRAINED_BYTES = 16  # a float32 parameter, its gradient and AdamW's two moments
# The paper: 2,300 A100 hours for 2.56 M samples of 40 guided UNet forward passes, SD 1.5 at 512 px in float32.
A100_SECONDS_A_FORWARD = 3.2 / 40
SD15_PAIR_FLOPS = 1.607e12
PLACEHOLDERS = ("a lighthouse on a cliff at dusk, oil painting", "a small red circle on a white background")


@dataclass(frozen=True)
class UNetWork:
    """Guided UNet forward passes for one sample. A backward pass to the inputs counts as one forward pass.

    before: steps before the switch, when no cache has the prefix.  tuned: steps after it.  recomputed: by gradient
    checkpointing, or because each step's graph is built separately.  graphs: steps whose activations are in memory at a time.
    """

    before: int
    tuned: int
    recomputed: int
    backward: int
    graphs: int

    @property
    def total(self) -> int:
        return self.before + self.tuned + self.recomputed + self.backward

    def __str__(self) -> str:
        parts = {"before the switch": self.before, "after it": self.tuned, "recomputed": self.recomputed}
        return " + ".join(f"{count} {what}" for what, count in {**parts, "backward": self.backward}.items() if count)


@dataclass(frozen=True)
class Plan:
    """Estimates for one training stage. memory: bytes on each device, by part. flops: FLOP of one sample, by part."""

    mix: str
    tune: TrainConfig
    processes: int
    chain_steps: int
    switch_step: int
    trainable: int
    work: UNetWork
    memory: dict[str, float]
    flops: dict[str, float]
    pair_flops: float
    unknown: tuple[str, ...]

    @property
    def batch(self) -> int:
        """Samples of one optimiser step, over all processes."""
        return self.tune.batch_size * self.tune.accumulation * self.processes

    @property
    def peak(self) -> float:
        """Peak memory of one device, in bytes."""
        return sum(self.memory.values()) * MARGIN + OVERHEAD

    def seconds(self, samples: int, flops_a_second: float) -> float:
        """Time for `samples` training samples on one device whose matrix products reach `flops_a_second`."""
        return samples * sum(self.flops.values()) / (flops_a_second * EFFICIENCY)

    def seconds_on_a100(self, samples: int) -> float:
        """Time for `samples` training samples on one A100, by the paper's figure."""
        return samples * self.work.total * A100_SECONDS_A_FORWARD * self.pair_flops / SD15_PAIR_FLOPS


def plan(config: Config, mix: str, root: Path) -> Plan | None:
    """The plan of `train --mix MIX`; None when the base's architecture is unknown. Raises ConfigError for an unknown mix."""
    if mix not in config.mix:
        raise ConfigError(unknown("mix", mix, config.mix))
    rewards = [name for name, weight in config.mix[mix].items() if weight]
    costs = footprint(config, root, rewards)
    return _plan(config, mix, costs) if costs else None


def _plan(config: Config, mix: str, costs: Footprint) -> Plan:
    tune = config.train
    chain = config.train_chain.num_inference_steps
    switch = switch_step(tune.switch_at, chain)
    work = unet_work(tune, chain - switch, switch if config.prepare.mode == "inline" else 0)
    trainable = _trainable(tune, costs)
    towers = costs.towers.values()
    at_once = tune.decode_size or tune.batch_size
    averages = 2 if tune.interpolation < 1 else int(tune.ema_decay > 0)
    memory = {
        "frozen UNet, VAE, text encoders": costs.unet.weights
        + costs.vae.weights
        + sum(encoder.weights for encoder in costs.text_encoders.values()),
        "reward towers": sum(tower.weights for tower in towers),
        "tuned copy, gradient, AdamW": float((TRAINED_BYTES + AVERAGE_BYTES * averages) * trainable),
        "UNet activations": costs.unet.saved * tune.batch_size * work.graphs,
        "VAE activations": _vae_activations(config, costs.vae, at_once),
        "reward activations": max((tower.saved for tower in towers), default=0) * at_once,  # one at a time
        "text encoder activations": sum(encoder.saved for encoder in costs.text_encoders.values()) * (tune.batch_size + 1),
    }
    flops = {
        "UNet": costs.unet.flops * work.total,
        "VAE": costs.vae.flops * (3 if config.base.vae_gradient_checkpointing else 2),
        "rewards": sum(tower.flops for tower in towers) * 2,
        "text encoder": sum(encoder.flops for encoder in costs.text_encoders.values()) * 6,
    }
    return Plan(
        mix=mix,
        tune=tune,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        chain_steps=chain,
        switch_step=switch,
        trainable=trainable,
        work=work,
        memory=memory,
        flops=flops,
        pair_flops=costs.unet.flops,
        unknown=costs.unknown,
    )


def unet_work(tune: TuneConfig, tuned_steps: int, before: int = 0) -> UNetWork:
    """UNet work of a gradient variant (`objective`).

    tuned_steps: steps after the switch.  before: steps before it that are not cached.
    `random` and `one_step` draw the number of steps; this is the maximum.
    """
    k = tune.grad_steps
    if tune.gradient == "one_step":
        return UNetWork(before, tuned_steps, recomputed=0, backward=1, graphs=1)
    if tune.gradient == "stop_gradient":
        return UNetWork(before, tuned_steps, recomputed=k, backward=k, graphs=1)
    checkpointed = tune.gradient_checkpointing
    return UNetWork(before, tuned_steps, recomputed=k if checkpointed else 0, backward=k, graphs=1 if checkpointed else k)


def _trainable(tune: TrainConfig, costs: Footprint) -> int:
    """Number of trained parameters. A text encoder that the base lacks counts 0 here and is refused on loading."""
    encoders = [costs.text_encoders[name] for name in tune.encoders if name in costs.text_encoders]
    # SDXL's UNet reads the concatenated embeddings of both encoders.
    negative = sum(encoder.embedding for encoder in costs.text_encoders.values()) if tune.negative_embedding else 0
    if tune.method == "lora":
        return negative + sum(tune.lora_rank * encoder.lora_sides for encoder in encoders)
    return negative + sum(encoder.parameters for encoder in encoders)


def _vae_activations(config: Config, vae: Cost, images: int) -> float:
    """Bytes of activations for decoding `images` images, with the VAE's gradient checkpointing and slicing as configured."""
    if not config.base.vae_gradient_checkpointing:
        return vae.saved * images
    return vae.kept * images + vae.recomputed * (1 if config.base.vae_slicing else images)


def table(made: Plan, truncated: dict[str, str], device: torch.device) -> Table:
    """The plan as a table. truncated: tokenizer -> how many prompts it truncates."""
    tune = made.tune
    shown = Table(title=f"train --mix {made.mix}: the plan", show_header=False, title_justify="left")
    source = "computed for each batch" if made.work.before else "from the cache"
    variant = "" if tune.gradient == "truncated" else f" ({tune.gradient})"
    rows = {
        "trainable parameters": f"{made.trainable:,}",
        "batch": f"{tune.batch_size} (micro) x {tune.accumulation} (accumulation) x {made.processes} (processes)"
        f" = {made.batch}",
        "samples in total": f"{tune.steps:,} steps x {made.batch} = {tune.steps * made.batch:,}",
        "chain": f"{made.chain_steps} steps, the first {made.switch_step} {source}, gradient through "
        f"{tune.grad_steps}{variant}",
        "guided UNet forward passes": f"{made.work.total} a sample ({made.work}), "
        f"{made.work.total * made.batch:,} an optimiser step",
    }
    rows |= {f"truncated by {name}": found for name, found in truncated.items()}
    rows |= {f"memory: {part}": gigabytes(size) for part, size in made.memory.items()}
    rows["memory in total"] = f"{gigabytes(made.peak)} on each device (estimate + 10 % + 1 GB); here: {capacity(device)}"
    if made.unknown:
        rows["not counted"] = f"{', '.join(made.unknown)}: unknown architecture"
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second that this device reaches on a matrix product: the median of seven short measurements."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        (left @ right).flatten()[0].item()  # synchronises with the device
        return time.perf_counter() - started

    return 2 * size**3 / sorted(once() for _ in range(7))[3]


def capacity(device: torch.device) -> str:
    """The device's name and memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {gigabytes(free)} free of {gigabytes(total)}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"CPU, {os.cpu_count()} cores, {gigabytes(total)}"


def gigabytes(size: float) -> str:
    """A size in GB of 1e9 bytes, as on a GPU's label, or in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def some_prompts(config: Config, root: Path, count: int) -> tuple[list[str], str]:
    """(the first `count` train prompts, a description of them); placeholders when there are no curated prompts."""
    from textcraftor.prompts.table import read_prompts

    path = root / TRAIN_PROMPTS
    if path.exists():
        prompts = read_prompts(path)["prompt"].head(count).to_list()
        return prompts, f"{len(prompts):,} train prompts"
    return [
        PLACEHOLDERS[i % len(PLACEHOLDERS)] for i in range(min(count, 64))
    ], "placeholders, since no prompts are curated yet"


def truncated_tokens(config: Config, root: Path) -> dict[str, str]:
    """Tokenizer of the base -> how many of the first 10,000 train prompts it truncates."""
    from transformers import AutoTokenizer

    folders = [folder for name in ("tokenizer", "tokenizer_2") if (folder := root / config.base.path / name).is_dir()]
    if not folders:
        return {"the base": "unknown until its tokenizer is fetched"}
    prompts, what = some_prompts(config, root, 10_000)
    found = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        limit = tokenizer.model_max_length
        cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False).input_ids)
        found[f"the base's {folder.name}"] = f"{cut:,} of {what}, at {limit} tokens"
    return found


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
