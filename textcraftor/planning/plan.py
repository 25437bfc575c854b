"""What a training run will take, before it is begun: parameters, UNet forwards, batch, memory, time; then one real batch.

All figures are estimates from shapes (`footprint`), with these assumptions, which the table repeats: fused attention,
every micro batch's activations alive until its backward pass, AdamW in float32, MARGIN for allocator and kernels; speed
is EFFICIENCY of what a matrix product reaches on this device.
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
OVERHEAD = 1e9  # bytes: the device's context, its libraries' workspaces
EFFICIENCY = 0.4
AVERAGE_BYTES = 4  # its moving average
TRAINED_BYTES = 16  # a float32 parameter with its gradient and AdamW's two moments
# The paper: 2,300 A100-hours for 2.56 M samples, at 40 guided UNet forwards a sample, SD 1.5 at 512 px in float32.
A100_SECONDS_A_FORWARD = 3.2 / 40
SD15_PAIR_FLOPS = 1.607e12
PLACEHOLDERS = ("a lighthouse on a cliff at dusk, oil painting", "a small red circle on a white background")


@dataclass(frozen=True)
class UNetWork:
    """Guided UNet forwards of one sample, a backward pass to the inputs counted as one.

    before: up to the switch, where no cache holds the prefix.  tuned: behind it.  recomputed: by checkpointing, or because
    a step's graph is built apart.  graphs: how many steps' activations are held at a time.
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
        parts = {"before the switch": self.before, "behind it": self.tuned, "recomputed": self.recomputed}
        return " + ".join(f"{count} {what}" for what, count in {**parts, "backward": self.backward}.items() if count)


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one training stage. memory: bytes by part, on each device. flops: of one sample, by part."""

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
        """Samples an optimiser step, over all processes."""
        return self.tune.batch_size * self.tune.accumulation * self.processes

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.memory.values()) * MARGIN + OVERHEAD

    def seconds(self, samples: int, flops_a_second: float) -> float:
        """For so many training samples on one device of that matrix-product speed."""
        return samples * sum(self.flops.values()) / (flops_a_second * EFFICIENCY)

    def seconds_on_a100(self, samples: int) -> float:
        """The same by the paper's own figure."""
        return samples * self.work.total * A100_SECONDS_A_FORWARD * self.pair_flops / SD15_PAIR_FLOPS


def plan(config: Config, mix: str, root: Path) -> Plan | None:
    """The plan of `train --mix MIX`; None when nothing tells the base's architecture. Raises ConfigError for the mix."""
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
    memory = {
        "frozen UNet, VAE, text encoders": costs.unet.weights
        + costs.vae.weights
        + sum(encoder.weights for encoder in costs.text_encoders.values()),
        "reward towers": sum(tower.weights for tower in towers),
        "tuned copy, gradient, AdamW": float((TRAINED_BYTES + (AVERAGE_BYTES if tune.ema_decay else 0)) * trainable),
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
    """Of the gradient variants (`objective`). tuned_steps: behind the switch; before: those that no cache holds.

    `random` and `one_step` draw how many steps they take; this is the most.
    """
    k = tune.grad_steps
    if tune.gradient == "one_step":
        return UNetWork(before, tuned_steps, recomputed=0, backward=1, graphs=1)
    if tune.gradient == "stop_gradient":
        return UNetWork(before, tuned_steps, recomputed=k, backward=k, graphs=1)
    again = tune.gradient_checkpointing
    return UNetWork(before, tuned_steps, recomputed=k if again else 0, backward=k, graphs=1 if again else k)


def _trainable(tune: TrainConfig, costs: Footprint) -> int:
    """Numbers that are trained; 0 of an encoder that this base lacks, which is refused when it is loaded."""
    encoders = [costs.text_encoders[name] for name in tune.encoders if name in costs.text_encoders]
    # SDXL's UNet reads what its two encoders make side by side.
    negative = sum(encoder.embedding for encoder in costs.text_encoders.values()) if tune.negative_embedding else 0
    if tune.method == "lora":
        return negative + sum(tune.lora_rank * encoder.lora_sides for encoder in encoders)
    return negative + sum(encoder.parameters for encoder in encoders)


def _vae_activations(config: Config, vae: Cost, images: int) -> float:
    """Bytes kept of decoding so many images; recomputing, a block at a time, of one image where the VAE slices."""
    if not config.base.vae_gradient_checkpointing:
        return vae.saved * images
    return vae.kept * images + vae.recomputed * (1 if config.base.vae_slicing else images)


def table(made: Plan, truncated: dict[str, str], device: torch.device) -> Table:
    """The plan as a table. truncated: tokenizer -> how many prompts it cuts."""
    tune = made.tune
    shown = Table(title=f"train --mix {made.mix}: the plan", show_header=False, title_justify="left")
    source = "for each batch anew" if made.work.before else "from the cache"
    variant = "" if tune.gradient == "truncated" else f" ({tune.gradient})"
    rows = {
        "trainable parameters": f"{made.trainable:,}",
        "batch": f"{tune.batch_size} (micro) x {tune.accumulation} (accumulation) x {made.processes} (processes)"
        f" = {made.batch}",
        "samples in all": f"{tune.steps:,} steps x {made.batch} = {tune.steps * made.batch:,}",
        "chain": f"{made.chain_steps} steps, the first {made.switch_step} {source}, gradient through "
        f"{tune.grad_steps}{variant}",
        "guided UNet forwards": f"{made.work.total} a sample ({made.work}), {made.work.total * made.batch:,} an optimiser step",
    }
    rows |= {f"truncated by {name}": found for name, found in truncated.items()}
    rows |= {f"memory: {part}": gigabytes(size) for part, size in made.memory.items()}
    rows["memory in all"] = f"{gigabytes(made.peak)} on each device, estimated (+10 % and 1 GB); here: {capacity(device)}"
    if made.unknown:
        rows["not counted"] = f"{', '.join(made.unknown)}: of no known architecture"
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second that this device reaches on a matrix product, measured in a fraction of a second."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        (left @ right).flatten()[0].item()  # waits for the device
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
    """1e9 bytes are a GB here, as on a GPU's label."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def some_prompts(config: Config, root: Path, count: int) -> tuple[list[str], str]:
    """(the first train prompts, what they are); placeholders before there is a curated set."""
    from textcraftor.prompts.table import read_prompts

    path = root / TRAIN_PROMPTS
    if path.exists():
        prompts = read_prompts(path)["prompt"].head(count).to_list()
        return prompts, f"{len(prompts):,} train prompts"
    return [PLACEHOLDERS[i % len(PLACEHOLDERS)] for i in range(min(count, 64))], "placeholders: nothing is curated yet"


def truncated_tokens(config: Config, root: Path) -> dict[str, str]:
    """Tokenizer of the base -> how many of the first 10,000 train prompts are longer than it reads."""
    from transformers import AutoTokenizer

    folders = [folder for name in ("tokenizer", "tokenizer_2") if (folder := root / config.base.path / name).is_dir()]
    if not folders:
        return {"the base": "unknown until its tokenizer is here"}
    prompts, what = some_prompts(config, root, 10_000)
    found = {}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        limit = tokenizer.model_max_length
        cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False).input_ids)
        found[f"the base's {folder.name}"] = f"{cut:,} of {what}, at {limit} tokens"
    return found


def peak_memory(device: torch.device) -> float:
    """Bytes: the most this process has held so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
