"""Workspaces for ablations and benchmarks: folders with settings of their own, in which the pipeline's own verbs run."""

import copy
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from textcraftor.artifact import write_json
from textcraftor.config import Config, merge
from textcraftor.layout import DIGESTS
from textcraftor.resolved import DigestCache, resolve_sections

LOG: Final = "log.txt"
SECONDS: Final = "seconds.json"

_lock = threading.Lock()
_running: set["subprocess.Popen[bytes]"] = set()
_stopped = threading.Event()


def make(folder: Path, params: Mapping[str, Any], settings: Mapping[str, Any], links: Mapping[str, Path]) -> Path:
    """A workspace with the settings of `params` and `settings` over them; returns its params.yaml.

    params: as a params.yaml holds them.  links: path in the workspace -> the file or folder that it stands for; what does not
    exist is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(merge(copy.deepcopy(dict(params)), settings), sort_keys=False), encoding="utf-8")
    for name, target in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        if target.exists():
            link.symlink_to(target.resolve())
    return path


def key(config: Config, root: Path, *what: object, sections: Collection[str] | None = None) -> str:
    """A name that changes with any setting or file that a stage of this run depends on, and with `what`.

    sections: of the resolved configuration, such as "base" and "mix.balanced", the only ones that count; None: all.
    """
    digests = DigestCache(root / DIGESTS)
    resolved = resolve_sections(config, root, digests)
    digests.save()
    counted = resolved if sections is None else {name: functools.reduce(_part, name.split("."), resolved) for name in sections}
    return hashlib.sha256(json.dumps([*map(str, what), counted], sort_keys=True).encode()).hexdigest()[:12]


def _part(section: Mapping[str, Any], name: str) -> Any:
    return section[name]


def run(params: Path, *arguments: str, environment: Mapping[str, str] | None = None, module: str = "textcraftor.cli") -> float:
    """Run `textcraftor ARGUMENTS`, or another module, in a workspace; returns the processor seconds that it took.

    Its output goes to workspace/log.txt, and its seconds are added up in workspace/seconds.json, also when it fails.
    Raises SystemExit when it fails, or when `stop` was called.
    """
    log = params.with_name(LOG)
    with log.open("a", encoding="utf-8") as file:
        with _lock:
            if _stopped.is_set():
                raise SystemExit("stopped")
            started = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "--params", params.name],
                cwd=params.parent,
                env={**os.environ, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; `stop` lets a training write its checkpoint
            )
            _running.add(started)
        _, status, usage = os.wait4(started.pid, 0)
        with _lock:
            started.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait again
            _running.discard(started)
    taken = usage.ru_utime + usage.ru_stime
    seconds = read_seconds(params.parent)
    write_json(params.with_name(SECONDS), {**seconds, arguments[0]: round(seconds.get(arguments[0], 0.0) + taken, 1)})
    if started.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-1:]
        raise SystemExit(f"`textcraftor {' '.join(arguments)}` failed in {params.parent} ({log.name}): {' '.join(last)}")
    return taken


def read_seconds(folder: Path) -> dict[str, float]:
    """Processor seconds that each verb has taken in a workspace, all its sittings together."""
    path = folder / SECONDS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def stop() -> None:
    """Send SIGTERM to every program that `run` waits for, and start no other: a training writes its checkpoint first."""
    with _lock:
        _stopped.set()
        for each in _running:
            each.terminate()
