"""Stage `prepare`: everything that training reads again and again and that no training changes.

Prefix latents for the train prompts (to the training switch) and the held-out prompts (to the sampling switch),
and the rewards' text features. All lie in stores (`store`) whose shards are keyed by what made them: a second call
recomputes only what is missing, stale or damaged. Under `torchrun` the processes divide the shards among them.
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
from textcraftor.cache.shard_file import DTYPES, Kind
from textcraftor.cache.store import INDEX, Content, Store, bytes_on_disk, fill, keep_only
from textcraftor.chain.sampler import Sampler
from textcraftor.config import ChainConfig, Config, RewardConfig, switch_step
from textcraftor.distributed import data_parallel
from textcraftor.distributed.work_split import Shares
from textcraftor.errors import StoreError
from textcraftor.layout import HELDOUT_PROMPTS, LATENTS, TRAIN_PROMPTS
from textcraftor.models.base import load_base
from textcraftor.prompts.table import noise_seed, read_prompts
from textcraftor.rewards import Reward, load_reward

TEXT_BATCH = 256  # prompts a text tower reads at a time


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
    return sorted({reward for mix in config.mixes for reward, weight in config.mix[mix].items() if weight})


def prepare(config: Config, root: Path, device: torch.device) -> None:
    """Fill `data/latents`.

    Raises ModelError or RewardError when weights are missing, PromptError without prompts, StoreError when what is to be
    stored does not fit on the disk.
    """
    device = data_parallel.start(device)
    shares = Shares()
    console = Console(stderr=True, quiet=shares.rank > 0)
    base = load_base(config.base, device)
    samplers = {
        "train": Sampler(base, config.train_chain, config.train.switch_at),
        "heldout": Sampler(base, config.chain, config.sampler.switch_at),
    }
    contents = {"train": _train_content(config, root), "heldout": _heldout_content(config, root)}
    kinds = {split: Kind(samplers[split].prefix_shape, str(contents[split].made_by["dtype"])) for split in contents}
    if config.prepare.mode == "inline":
        del contents["train"]
    _require_space(root, contents, kinds, shares)
    _fill_features(config, root, device, shares, console)
    _require_space(root, contents, kinds, shares)
    for split, content in contents.items():
        sampler, kind = samplers[split], kinds[split]
        compute = _prefixes(sampler, content.table, DTYPES[kind.dtype])
        made = fill(root / LATENTS / split, content, compute, config.prepare.batch_size, kind, shares)
        count = f"{split}: {content.table.height} prefixes of {sampler.switch_step} steps"
        console.print(f"{count} {_how(made, len(content.shards))}", highlight=False)
    if shares.rank == 0:
        if config.prepare.mode == "inline":
            _store_nothing(root / LATENTS / "train")
            console.print("train: nothing is stored, training computes each batch's prefixes (prepare.mode: inline)")
        keep_only(root / LATENTS, ["train", "heldout", "features"])
    shares.wait()


def read_train_latents(config: Config, root: Path) -> Store:
    """(N, C', h, w): the train split's latents at the training switch. Raises StoreError when stale."""
    return Store(root / LATENTS / "train", _train_content(config, root))


def read_heldout_latents(config: Config, root: Path) -> Store:
    """(N * images_per_prompt, C', h, w): held-out latents at the sampling switch. Raises StoreError when stale."""
    return Store(root / LATENTS / "heldout", _heldout_content(config, root))


def read_text_features(config: Config, root: Path, reward: str) -> Store:
    """(N, D): one reward's text features of the train prompts. Raises StoreError when stale."""
    return Store(root / LATENTS / "features" / reward, _features_content(config, root, reward))


def _train_content(config: Config, root: Path) -> Content:
    made_by = _prefix_facts(config, config.train_chain, config.train.switch_at, config.prepare.dtype)
    return Content(made_by, train_table(config, root), config.prepare.shard_rows)


def _heldout_content(config: Config, root: Path) -> Content:
    """Always float32: every candidate is compared with the base, and the base with what others publish."""
    prompts, _, seeds = heldout_rows(config, root)
    table = pl.DataFrame({"prompt": prompts, "seed": seeds}, schema={"prompt": pl.String, "seed": pl.Int64})
    made_by = _prefix_facts(config, config.chain, config.sampler.switch_at, "float32")
    return Content(made_by, table, config.prepare.shard_rows)


def _features_content(config: Config, root: Path, reward: str) -> Content:
    made_by = {"text_features": reward_facts(config.rewards[reward])}
    return Content(made_by, train_table(config, root).select("prompt"), config.prepare.shard_rows)


def _prefix_facts(config: Config, chain: ChainConfig, switch_at: float, dtype: str) -> dict[str, Any]:
    """All that a prefix depends on beside prompt and seed. Of the base its encoder, UNet and scheduler, by their bytes."""
    return {
        "base": base_identity(config.base),
        "resolution": config.base.resolution,
        "chain": chain.model_dump(mode="json"),
        "switch": switch_step(switch_at, chain.num_inference_steps),
        "dtype": dtype,
    }


def reward_facts(reward: RewardConfig) -> dict[str, Any]:
    """What a reward's numbers depend on: its settings, and files by their bytes, wherever they lie."""
    files = ("path", "head", "tokenizer")
    settings = reward.model_dump(mode="json", exclude={*files, "licence"})
    return settings | {name: identity(getattr(reward, name)) for name in files if getattr(reward, name)}


def _fill_features(config: Config, root: Path, device: torch.device, shares: Shares, console: Console) -> None:
    folder = root / LATENTS / "features"
    names = trained_rewards(config) if config.prepare.mode == "cache" else []
    for name in names:
        content = _features_content(config, root, name)
        made = fill(folder / name, content, _text_features(config, name, content, device), TEXT_BATCH, None, shares)
        console.print(f"{name}: text features of {content.table.height} prompts {_how(made, len(content.shards))}")
    if shares.rank == 0:
        if names:
            keep_only(folder, names)
        else:
            _store_nothing(folder)


def _prefixes(sampler: Sampler, table: pl.DataFrame, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """rows -> (B, C', h, w) on the CPU."""
    prompts, seeds = table["prompt"], table["seed"]

    def prefixes(rows: slice) -> Tensor:
        return sampler.prefix(prompts[rows].to_list(), seeds[rows].to_list()).float().cpu().to(dtype)

    return prefixes


def _text_features(config: Config, name: str, content: Content, device: torch.device) -> Callable[[slice], Tensor]:
    """rows -> (B, D) float32; the reward is loaded when it is first needed, which may be never."""

    @functools.cache
    def reward() -> Reward:
        return load_reward(name, config.rewards[name], device)

    def features(rows: slice) -> Tensor:
        return reward().text_features(content.table["prompt"][rows].to_list()).float().cpu()

    return features


def _store_nothing(folder: Path) -> None:
    """Say that training computes itself what would lie here; what did is removed, so that a stage's output is one thing."""
    write_json(folder / INDEX, {"mode": "inline"})
    keep_only(folder, [INDEX])


def _require_space(root: Path, contents: dict[str, Content], kinds: dict[str, Kind], shares: Shares) -> None:
    """Raise StoreError when the disk is too small for the prefixes: now, and not after hours of work."""
    folder = root / LATENTS
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {split: content.size(kinds[split]) for split, content in contents.items()}
    present = sum(min(bytes_on_disk(folder / split), size) for split, size in wanted.items())
    aside = max(kinds[split].bytes * content.rows(0) for split, content in contents.items()) * shares.processes
    free, needed = shutil.disk_usage(folder).free, sum(wanted.values()) - present + aside
    if needed > free:
        rows = sum(content.table.height for content in contents.values())
        raise StoreError(
            f"{folder} needs {_gigabytes(needed)} more for {rows:,} prefixes, and the disk has {_gigabytes(free)} free. "
            "Make room, halve it with prepare.dtype: float16, or store nothing with prepare.mode: inline"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _how(made: int, shards: int) -> str:
    if made in (0, shards):
        return "computed" if made else "reused"
    return f"{made} of {shards} shards computed, the others reused"
