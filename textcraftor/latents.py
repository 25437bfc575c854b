"""The prefix cache: latents at the switch, which depend on nothing that is tuned.

A file holds the latents of its prompts in order, and the key of all that made them: base, chain, prompts,
seeds. A file whose key differs is stale, and is never used.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from textcraftor.artifact import written_aside
from textcraftor.config import ChainConfig
from textcraftor.errors import ModelError
from textcraftor.sampler import Sampler


def prefix_key(base: str, chain: ChainConfig, switch: int, prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """sha256 of everything a prefix depends on. base: `artifact.identity`; switch: its step index."""
    facts = {
        "base": base,
        "chain": chain.model_dump(mode="json"),
        "switch": switch,
        "rows": [list(prompts), [int(seed) for seed in seeds]],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cache_prefix(path: Path, key: str, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> bool:
    """Make sure that `path` holds the prefixes of these rows, (N, C', h, w). Returns whether they had to be computed."""
    if stored_key(path) == key and _shape(path) == (len(prompts), *sampler.prefix_shape):
        return False
    starts = range(0, len(prompts), batch_size)
    batches = [
        sampler.prefix(prompts[i : i + batch_size], seeds[i : i + batch_size]).float().cpu()
        for i in track(starts, description=f"prefix latents, {path.stem}", console=Console(stderr=True), transient=True)
    ]
    save_tensor(path, "latents", torch.cat(batches), key)
    return True


def save_tensor(path: Path, name: str, tensor: Tensor, key: str) -> None:
    """Write one keyed tensor atomically."""
    with written_aside(path) as aside:
        save_file({name: tensor.contiguous()}, aside, metadata={"key": key})


def read_tensor(path: Path, name: str, key: str) -> Tensor:
    """The tensor of a keyed file. Raises ModelError when the file is missing, damaged or of another key."""
    if stored_key(path) != key:
        state = "belongs to other prompts, base or settings" if path.exists() else "does not exist"
        raise ModelError(f"{path} {state}. Run `textcraftor prepare` (or `dvc repro prepare`) first")
    try:
        return load_file(path)[name]
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}). Delete it and run `textcraftor prepare`") from None


def stored_key(path: Path) -> str | None:
    """The key in a file's header; None when there is no such file or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (FileNotFoundError, OSError, SafetensorError):
        return None


def _shape(path: Path) -> tuple[int, ...]:
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice("latents").get_shape())
