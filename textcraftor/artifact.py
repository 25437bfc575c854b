"""Artifacts on disk: written whole or not at all, digested, and carrying their proof."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from textcraftor.config import BaseConfig, RewardConfig

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "textcraftor")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; it takes the name only on success.

    On an exception what was there before is untouched and nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        aside = Path(scratch) / path.name
        yield aside
        for entry in (aside, *aside.rglob("*")):
            _sync(entry)
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be replaced in one step: move the old one into the scratch, then rename.
            path.rename(Path(scratch) / "replaced")
        aside.replace(path)
        _sync(path.parent)


def clear_aside(path: Path) -> None:
    """Remove what a killed `written_aside(path)` left. Only for paths that no other process is writing."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, in a stable order, with a final newline."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder: its files' relative names and digests, sorted.

    Raises FileNotFoundError when there is nothing at `path`.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(path)
    total = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return total.hexdigest()


def identity(path: str, revision: str | None = None) -> str:
    """What identifies a model's bytes: the digest of a local file or folder, or a hub id with its revision."""
    return digest(Path(path)) if path and Path(path).exists() else f"{path}@{revision}"


def base_identity(base: BaseConfig) -> str:
    """What identifies a base's bytes as they are used: its files, what names its architecture, and its precision.

    The resolution is left out: latents show it by their shape.
    """
    parts = [identity(base.path, base.revision)]
    if base.config:
        parts.append(identity(base.config, base.revision))
    if base.dtype != "float32":
        parts.append(base.dtype)
    return " ".join(parts)


def reward_identity(reward: RewardConfig) -> str:
    """What identifies a reward's bytes: its weights, and its head and tokenizer where they lie elsewhere."""
    return " ".join(identity(path) for path in (reward.path, reward.head, reward.tokenizer) if path)


def proof(config: Mapping[str, pydantic.BaseModel | Any], inputs: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """What an artifact must carry: config, seed, code revision, digests of what went in, versions.

    No time and no host: the same inputs must give the same bytes.
    """
    return {
        "config": {
            name: section.model_dump(mode="json") if isinstance(section, pydantic.BaseModel) else section
            for name, section in config.items()
        },
        "seed": seed,
        "code_revision": code_revision(),
        "inputs": {name: digest(path) for name, path in sorted(inputs.items())},
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def code_revision() -> str:
    """The commit the library runs from, "+dirty" where its files differ from it; its version outside git."""
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return _version("textcraftor")
    run = [git, "-C", str(here)]
    commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode != 0:
        return _version("textcraftor")
    changed = subprocess.run([*run, "status", "--porcelain", "--", "."], capture_output=True, text=True)
    return commit.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _sync(entry: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, so that a rename never outlives its bytes."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
