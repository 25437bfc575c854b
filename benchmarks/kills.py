"""Kills a training run at random moments and while it writes checkpoints, and checks that its result has the same bytes.

    python -m benchmarks.kills --kills 20

Trains on a few prompts of the tiny world without interruption, then again with SIGKILLs, resuming with the same call each
time, and compares the digests of both artifacts: weights, history, sample grids, proof.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from textcraftor import config as configuration
from textcraftor.artifact import digest
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config
from textcraftor.layout import TRAINING_STATE
from textcraftor.prompts import curate
from textcraftor.training.stages import train_text_encoder

CPU = torch.device("cpu")


# Children are forked from a server that has imported everything but started no threads: fast and safe. Python 3.11's server
# finds installed modules only, and says nothing about one that it does not find.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["textcraftor.training.stages"])


def killed(work: Callable[..., object], arguments: tuple[Any, ...], moment: Callable[[], bool]) -> bool:
    """Run `work` in a child process and kill it as soon as `moment()` is true.  Returns False if it ended before that.

    Raises RuntimeError if it failed.
    """
    child = FORKS.Process(target=_quietly, args=(Path.cwd(), work, arguments))
    child.start()
    while child.is_alive():
        if moment():
            child.kill()
            child.join()
            return child.exitcode == -signal.SIGKILL
        time.sleep(0.0005)
    if child.exitcode:
        raise RuntimeError(f"the run failed on its own, status {child.exitcode}")
    return False


def _quietly(folder: Path, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work(*arguments)


def survive(config: Config, mix: str, root: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Train one mix in a prepared workspace without and with kills; returns both digests and the number of kills.

    Every other kill waits until a checkpoint is being written.
    """
    out, draw = root / "data/encoders" / mix, random.Random(seed)
    run = (train_text_encoder, (config, mix, root, CPU))
    killed(abs, (0,), lambda: False)  # starts the server, whose imports are no part of the run's length
    started = time.monotonic()
    killed(*run, moment=lambda: False)
    length, unbroken = time.monotonic() - started, digest(out)
    shutil.rmtree(out)
    struck = {"at a random moment": 0, "amid a checkpoint": 0}
    while sum(struck.values()) < kills:
        amid = sum(struck.values()) % 2 == 1
        if killed(*run, moment=Moment(time.monotonic() + draw.uniform(0, 0.6 * length), root if amid else None)):
            struck["amid a checkpoint" if amid else "at a random moment"] += 1
            print(f"kill {sum(struck.values())}/{kills}", file=sys.stderr, flush=True)
        else:
            print("it ended before the kill; once more from the start", file=sys.stderr, flush=True)
            shutil.rmtree(out, ignore_errors=True)
    killed(*run, moment=lambda: False)
    left = [*map(str, (root / TRAINING_STATE).rglob("*")), *(str(p) for folder in (out.parent, out) for p in folder.glob(".*"))]
    return {"unbroken": unbroken, "broken": digest(out), "same": digest(out) == unbroken, "kills": struck, "left_behind": left}


@dataclass(frozen=True)
class Moment:
    """True after `deadline`; with `root`, only while a checkpoint in that workspace is being written."""

    deadline: float
    root: Path | None

    def __call__(self) -> bool:
        if time.monotonic() < self.deadline:
            return False
        return self.root is None or any((self.root / TRAINING_STATE).glob("*/*/.checkpoint.safetensors.*"))


def main() -> None:
    """Run in a temporary workspace with the shipped tiny model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = Path().resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data/tiny").symlink_to(here / "data/tiny")
        os.chdir(root)
        Path("params.yaml").write_text("profile: tiny\nmixes: [balanced]\n")
        train = {"steps": options.steps, "batch_size": 2, "checkpoint_every": 1, "grid_every": 10, "grad_steps": 1}
        sources = [{"kind": "scenes", "count": 40}]
        config = configuration.load(
            "params.yaml",
            {"prompts": {"sources": sources, "heldout": 8}, "train": train, "evaluate": {"prompts": 8, "images_per_prompt": 2}},
        )
        curate(config.prompts, root, root / "data/prompts/curated")
        prepare(config, root, CPU)
        found = survive(config, "balanced", root, options.kills, options.seed)
        os.chdir(here)
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["same"] and not found["left_behind"] else 1)


if __name__ == "__main__":
    main()
