"""Workspaces for benchmarks: folders with settings of their own, in which the pipeline's own verbs run."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from textcraftor.config import Config, merge
from textcraftor.layout import DIGESTS
from textcraftor.resolved import DigestCache, resolve_sections


def make(folder: Path, params: Path, settings: Mapping[str, Any], links: Mapping[str, Path]) -> Path:
    """A workspace with the settings of `params` and `settings` over them; returns its params.yaml.

    links: path in the workspace -> the file or folder that it stands for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged = merge(copy.deepcopy(yaml.safe_load(params.read_text(encoding="utf-8"))), dict(settings))
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    for name, target in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        if target.exists():
            link.symlink_to(target.resolve())
    return path


def key(config: Config, root: Path, *what: object) -> str:
    """A name that changes with any setting or file that a stage of this run depends on, and with `what`."""
    sections = resolve_sections(config, root, DigestCache(root / DIGESTS))
    return hashlib.sha256(json.dumps([*map(str, what), sections], sort_keys=True).encode()).hexdigest()[:12]


def run(params: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> float:
    """Run `textcraftor ARGUMENTS` in a workspace; returns the processor seconds that it took.

    Its output goes to workspace/log.txt.  Raises SystemExit when it fails.
    """
    command: Sequence[str] = [sys.executable, "-m", "textcraftor.cli", *arguments, "--params", params.name]
    log = params.with_name("log.txt")
    with log.open("a", encoding="utf-8") as file:
        started = subprocess.Popen(
            command, cwd=params.parent, env={**os.environ, **(environment or {})}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait again
    if started.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-1:]
        raise SystemExit(f"`textcraftor {' '.join(arguments)}` failed in {params.parent} ({log.name}): {' '.join(last)}")
    return usage.ru_utime + usage.ru_stime
