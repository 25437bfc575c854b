"""Artifacts on disk: written atomically, identified by digests, with a proof of what made them."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from textcraftor.config import BaseConfig, RewardConfig, locate

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "textcraftor")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to, which replaces `path` on success.

    On an exception `path` is unchanged and the temporary path is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        aside = Path(scratch) / path.name
        yield aside
        for entry in (aside, *aside.rglob("*")):
            _sync(entry)
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be replaced in one step: move the old one away first.
            path.rename(Path(scratch) / "replaced")
        aside.replace(path)
        _sync(path.parent)


def clear_aside(path: Path) -> None:
    """Remove the temporary files of a killed `written_aside(path)`. No other process may be writing `path`."""
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
    return folder_digest({file.relative_to(path).as_posix(): digest(file) for file in path.rglob("*") if file.is_file()})


def folder_digest(files: Mapping[str, str]) -> str:
    """sha256 of a folder, from its files' relative names and their digests."""
    total = hashlib.sha256()
    for name in sorted(files, key=PurePosixPath):
        total.update(f"{name}\0{files[name]}\n".encode())
    return total.hexdigest()


def identity(path: str, root: Path, revision: str | None = None) -> str:
    """Identifies a model's bytes: the sha256 of a file or folder of the workspace, or a hub id with its revision."""
    located = Path(locate(path, root))
    return digest(located) if located.exists() else f"{path}@{revision}"


def base_identity(base: BaseConfig, root: Path) -> str:
    """Identifies a base model's bytes as they are used: every file it names, and its precision.

    The resolution is left out: the shape of latents shows it.
    """
    parts = [identity(path, root, base.revision) for path in base.own_files().values()]
    if base.dtype != "float32":
        parts.append(base.dtype)
    return " ".join(parts)


def reward_identity(reward: RewardConfig, root: Path) -> str:
    """Identifies a reward's bytes: its weights, and its head and tokenizer where the profile names them."""
    return " ".join(identity(path, root) for path in reward.own_files().values())


def proof(config: Mapping[str, pydantic.BaseModel | Any], inputs: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """The record that every artifact carries: config, seed, code revision, digests of its inputs, library versions.

    It holds no time and no host, so that equal inputs give equal bytes.
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
    """The commit of the repository that tracks the library's files, "+dirty" where they differ from it.

    The library's version where no repository tracks them, such as in an environment inside another project's.
    """
    module, git = Path(__file__), shutil.which("git")
    if git is None:
        return _version("textcraftor")
    run = [git, "-C", str(module.parent)]
    tracked = subprocess.run([*run, "ls-files", "--error-unmatch", module.name], capture_output=True)
    commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True)
    if tracked.returncode or commit.returncode:
        return _version("textcraftor")
    changed = subprocess.run([*run, "status", "--porcelain", "--", "."], capture_output=True, text=True)
    return commit.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _sync(entry: Path) -> None:
    """Flush a file or a folder's entries to disk, so that a rename is never stored before the bytes."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
