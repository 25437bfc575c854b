"""Stage `prepare`: the inputs that training reads repeatedly and never changes.

Prefix latents of the train prompts (up to the training switch) and of the held-out prompts (up to the sampling
switch), and the rewards' text features. Each is a store (`store`) whose shards are keyed by what they were computed
from: a second call recomputes only missing, stale or damaged shards. Under `torchrun` the ranks divide the shards.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console
from torch import Tensor

from textcraftor.artifact import base_identity, identity, write_json
from textcraftor.cache.shard_file import DTYPES, RowFormat
from textcraftor.cache.store import INDEX, Store, StoreContent, bytes_on_disk, fill, keep_only
from textcraftor.chain.sampler import Sampler
from textcraftor.config import ChainConfig, Config, RewardConfig, switch_step
from textcraftor.distributed import data_parallel
from textcraftor.distributed.work_split import WorkSplit
from textcraftor.errors import StoreError
from textcraftor.layout import HELDOUT_PROMPTS, LATENTS, TRAIN_PROMPTS
from textcraftor.models.base import load_base
from textcraftor.prompts.table import noise_seed, read_prompts
from textcraftor.rewards import Reward, load_reward

TEXT_BATCH = 256  # prompts a text tower encodes at a time


def train_table(config: Config, root: Path) -> pl.DataFrame:
    """prompt and seed of each row of the train split's stores: `train.images_per_prompt` rows for each prompt, in order."""
    path, images = root / TRAIN_PROMPTS, config.train.images_per_prompt
    if images == 1:
        return read_prompts(path, ["prompt", "seed"])
    table = read_prompts(path, ["prompt", "prompt_id"])
    seeds = [noise_seed(key, image) for key in table["prompt_id"] for image in range(images)]
    repeated = table.select(pl.col("prompt").repeat_by(images).explode())
    return repeated.with_columns(pl.Series("seed", seeds, dtype=pl.Int64))


def heldout_rows(config: Config, root: Path) -> tuple[list[str], list[str], list[int]]:
    """(prompts, prompt_ids, seeds) of the evaluation: `images_per_prompt` rows for each held-out prompt, in order."""
    table = read_prompts(root / HELDOUT_PROMPTS).head(config.evaluate.prompts)
    images = range(config.evaluate.images_per_prompt)
    rows = [
        (prompt, key, noise_seed(key, i)) for prompt, key in table.select("prompt", "prompt_id").iter_rows() for i in images
    ]
    prompts, keys, seeds = zip(*rows, strict=True)
    return list(prompts), list(keys), list(seeds)


def trained_rewards(config: Config) -> list[str]:
    """The rewards that the selected mixes weigh, in a stable order."""
    return sorted({reward for mix in config.all_mixes for reward, weight in config.mix[mix].items() if weight})


def prepare(config: Config, root: Path, device: torch.device) -> None:
    """Fill `data/latents`.

    Raises ModelError or RewardError when weights are missing, PromptError without prompts, StoreError when what is to be
    stored does not fit on the disk.
    """
    device = data_parallel.start(device)
    work = WorkSplit()
    console = Console(stderr=True, quiet=work.rank > 0)
    base = load_base(config.base.at(root), device)
    samplers = {
        "train": Sampler(base, config.train_chain, config.train.switch_at),
        "heldout": Sampler(base, config.chain, config.sampler.switch_at),
    }
    contents = {"train": _train_content(config, root), "heldout": _heldout_content(config, root)}
    formats = {split: RowFormat(samplers[split].prefix_shape, str(contents[split].made_by["dtype"])) for split in contents}
    if config.prepare.mode == "inline":
        del contents["train"]
    _require_space(root, contents, formats, work)
    _fill_features(config, root, device, work, console)
    _require_space(root, contents, formats, work)
    for split, content in contents.items():
        sampler, row_format = samplers[split], formats[split]
        compute = _prefixes(sampler, content.table, DTYPES[row_format.dtype])
        made = fill(root / LATENTS / split, content, compute, config.prepare.batch_size, row_format, work)
        count = f"{split}: {content.table.height} prefixes of {sampler.switch_step} steps"
        console.print(f"{count} {_describe_reuse(made, len(content.shards))}", highlight=False)
    if work.rank == 0:
        if config.prepare.mode == "inline":
            _write_inline_marker(root / LATENTS / "train")
            console.print("train: nothing is stored, training computes each batch's prefixes (prepare.mode: inline)")
        keep_only(root / LATENTS, ["train", "heldout", "features"])
    work.barrier()


def read_train_latents(config: Config, root: Path) -> Store:
    """(N, C', h, w): the train split's latents at the training switch. Raises StoreError when stale."""
    return Store(root / LATENTS / "train", _train_content(config, root))


def read_heldout_latents(config: Config, root: Path) -> Store:
    """(N * images_per_prompt, C', h, w): held-out latents at the sampling switch. Raises StoreError when stale."""
    return Store(root / LATENTS / "heldout", _heldout_content(config, root))


def read_text_features(config: Config, root: Path, reward: str) -> Store:
    """(N, D): one reward's text features of the train prompts. Raises StoreError when stale."""
    return Store(root / LATENTS / "features" / reward, _features_content(config, root, reward))


def _train_content(config: Config, root: Path) -> StoreContent:
    made_by = _prefix_facts(config, root, config.train_chain, config.train.switch_at, config.prepare.dtype)
    return StoreContent(made_by, train_table(config, root), config.prepare.shard_rows)


def _heldout_content(config: Config, root: Path) -> StoreContent:
    """Always float32: candidates are compared with the base, and the base with published results."""
    prompts, _, seeds = heldout_rows(config, root)
    table = pl.DataFrame({"prompt": prompts, "seed": seeds}, schema={"prompt": pl.String, "seed": pl.Int64})
    made_by = _prefix_facts(config, root, config.chain, config.sampler.switch_at, "float32")
    return StoreContent(made_by, table, config.prepare.shard_rows)


def _features_content(config: Config, root: Path, reward: str) -> StoreContent:
    made_by = {"text_features": reward_facts(config.rewards[reward], root)}
    return StoreContent(made_by, train_table(config, root).select("prompt"), config.prepare.shard_rows)


def _prefix_facts(config: Config, root: Path, chain: ChainConfig, switch_at: float, dtype: str) -> dict[str, Any]:
    """Everything a prefix depends on besides prompt and seed. The base is identified by its files' digests."""
    return {
        "base": base_identity(config.base, root),
        "resolution": config.base.resolution,
        "chain": chain.model_dump(mode="json"),
        "switch": switch_step(switch_at, chain.num_inference_steps),
        "dtype": dtype,
    }


def reward_facts(reward: RewardConfig, root: Path) -> dict[str, Any]:
    """What a reward's scores depend on: its settings, and its files by digest instead of path."""
    settings = reward.model_dump(mode="json", exclude={"path", "head", "tokenizer", "licence"})
    return settings | {name: identity(path, root) for name, path in reward.own_files().items()}


def _fill_features(config: Config, root: Path, device: torch.device, work: WorkSplit, console: Console) -> None:
    folder = root / LATENTS / "features"
    names = trained_rewards(config) if config.prepare.mode == "cache" else []
    for name in names:
        content = _features_content(config, root, name)
        made = fill(folder / name, content, _text_features(config, name, content, root, device), TEXT_BATCH, None, work)
        console.print(f"{name}: text features of {content.table.height} prompts {_describe_reuse(made, len(content.shards))}")
    if work.rank == 0:
        if names:
            keep_only(folder, names)
        else:
            _write_inline_marker(folder)


def _prefixes(sampler: Sampler, table: pl.DataFrame, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """rows -> (B, C', h, w) on the CPU."""
    prompts, seeds = table["prompt"], table["seed"]

    def prefixes(rows: slice) -> Tensor:
        return sampler.prefix(prompts[rows].to_list(), seeds[rows].to_list()).float().cpu().to(dtype)

    return prefixes


def _text_features(
    config: Config, name: str, content: StoreContent, root: Path, device: torch.device
) -> Callable[[slice], Tensor]:
    """rows -> (B, D) float32; the reward is loaded at the first call, which may never come."""

    @functools.cache
    def reward() -> Reward:
        return load_reward(name, config.rewards[name].at(root), device)

    def features(rows: slice) -> Tensor:
        return reward().text_features(content.table["prompt"][rows].to_list()).float().cpu()

    return features


def _write_inline_marker(folder: Path) -> None:
    """Replace a store by a marker that training computes its rows itself (`prepare.mode: inline`)."""
    write_json(folder / INDEX, {"mode": "inline"})
    keep_only(folder, [INDEX])


def _require_space(root: Path, contents: dict[str, StoreContent], formats: dict[str, RowFormat], work: WorkSplit) -> None:
    """Raise StoreError when the disk is too small for the prefixes, before hours of work are spent."""
    folder = root / LATENTS
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {split: content.size(formats[split]) for split, content in contents.items()}
    present = sum(min(bytes_on_disk(folder / split), size) for split, size in sizes.items())
    replacement = max(formats[split].bytes * content.rows(0) for split, content in contents.items()) * work.world_size
    free, needed = shutil.disk_usage(folder).free, sum(sizes.values()) - present + replacement
    if needed > free:
        rows = sum(content.table.height for content in contents.values())
        raise StoreError(
            f"{folder} needs {_gigabytes(needed)} more for {rows:,} prefixes, and the disk has {_gigabytes(free)} free. "
            "Make room, halve it with prepare.dtype: float16, or store nothing with prepare.mode: inline"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _describe_reuse(made: int, shards: int) -> str:
    if made in (0, shards):
        return "computed" if made else "reused"
    return f"{made} of {shards} shards computed, the others reused"
