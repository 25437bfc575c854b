"""Stage `prepare`: everything that training reads again and again and that no training changes.

Prefix latents for the train prompts (to the training switch) and the held-out prompts (to the sampling switch),
and the rewards' text features. All are keyed by what made them: a second call recomputes only what is stale.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from textcraftor.artifact import base_identity, identity
from textcraftor.config import ChainConfig, Config, RewardConfig, switch_step
from textcraftor.latents import cache_prefix, prefix_key, read_tensor, save_tensor, stored_key
from textcraftor.models import load_base
from textcraftor.prompts.table import noise_seed, read_prompts
from textcraftor.rewards import load_reward
from textcraftor.sampler import Sampler

LATENTS = Path("data/latents")
CURATED = Path("data/prompts/curated")


def train_rows(root: Path) -> tuple[list[str], list[str], list[int]]:
    """(prompts, prompt_ids, seeds) of the train split, one row a prompt."""
    table = read_prompts(root / CURATED / "train.parquet")
    return table["prompt"].to_list(), table["prompt_id"].to_list(), table["seed"].to_list()


def heldout_rows(config: Config, root: Path) -> tuple[list[str], list[str], list[int]]:
    """(prompts, prompt_ids, seeds) of the evaluation: `images_per_prompt` rows for each held-out prompt, in order."""
    table = read_prompts(root / CURATED / "heldout.parquet").head(config.evaluate.prompts)
    images = range(config.evaluate.images_per_prompt)
    rows = [
        (prompt, key, noise_seed(key, i)) for prompt, key in table.select("prompt", "prompt_id").iter_rows() for i in images
    ]
    prompts, keys, seeds = zip(*rows, strict=True)
    return list(prompts), list(keys), list(seeds)


def trained_rewards(config: Config) -> list[str]:
    """The rewards that the selected mixes weigh, in a stable order."""
    return sorted({reward for mix in config.mixes for reward, weight in config.mix[mix].items() if weight})


def features_key(reward: RewardConfig, prompts: Sequence[str]) -> str:
    """sha256 of what a reward's text features depend on: its weights and the prompts."""
    facts = "\0".join([reward.model_dump_json(), identity(reward.path), *prompts])
    return hashlib.sha256(facts.encode()).hexdigest()


def prepare(config: Config, root: Path, device: torch.device) -> None:
    """Fill `data/latents`. Raises ModelError or RewardError when weights are missing, PromptError without prompts."""
    console = Console(stderr=True)
    base = load_base(config.base, device)
    for split, (prompts, _, seeds), chain, switch_at in (
        ("train", train_rows(root), config.train_chain, config.train.switch_at),
        ("heldout", heldout_rows(config, root), config.chain, config.sampler.switch_at),
    ):
        sampler = Sampler(base, chain, switch_at)
        path, key = root / LATENTS / f"{split}.safetensors", _latents_key(config, chain, switch_at, prompts, seeds)
        made = cache_prefix(path, key, sampler, prompts, seeds, config.prepare.batch_size)
        console.print(f"{split}: {len(prompts)} prefixes of {sampler.switch_step} steps {'computed' if made else 'reused'}")
    prompts, _, _ = train_rows(root)
    for name in trained_rewards(config):
        path, key = root / LATENTS / "features" / f"{name}.safetensors", features_key(config.rewards[name], prompts)
        if stored_key(path) == key:
            continue
        reward = load_reward(name, config.rewards[name], device)
        batches = [reward.text_features(prompts[i : i + 256]).float().cpu() for i in range(0, len(prompts), 256)]
        save_tensor(path, "text_features", torch.cat(batches), key)
        console.print(f"{name}: text features of {len(prompts)} prompts computed")


def read_train_latents(config: Config, root: Path) -> torch.Tensor:
    """(N, C, h, w): the train split's latents at the training switch. Raises ModelError when stale."""
    prompts, _, seeds = train_rows(root)
    key = _latents_key(config, config.train_chain, config.train.switch_at, prompts, seeds)
    return read_tensor(root / LATENTS / "train.safetensors", "latents", key)


def read_heldout_latents(config: Config, root: Path) -> torch.Tensor:
    """(N * images_per_prompt, C, h, w): held-out latents at the sampling switch. Raises ModelError when stale."""
    prompts, _, seeds = heldout_rows(config, root)
    key = _latents_key(config, config.chain, config.sampler.switch_at, prompts, seeds)
    return read_tensor(root / LATENTS / "heldout.safetensors", "latents", key)


def read_text_features(config: Config, root: Path, reward: str, prompts: Sequence[str]) -> torch.Tensor:
    """(N, D): one reward's text features of the train prompts. Raises ModelError when stale."""
    path = root / LATENTS / "features" / f"{reward}.safetensors"
    return read_tensor(path, "text_features", features_key(config.rewards[reward], prompts))


def _latents_key(config: Config, chain: ChainConfig, switch_at: float, prompts: Sequence[str], seeds: Sequence[int]) -> str:
    return prefix_key(base_identity(config.base), chain, switch_step(switch_at, chain.num_inference_steps), prompts, seeds)
