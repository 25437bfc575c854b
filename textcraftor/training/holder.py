"""One process at a time trains a mix: two would share a checkpoint folder and delete each other's unfinished output."""

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from textcraftor.errors import TrainingError


@contextlib.contextmanager
def sole_holder(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` during the block; the kernel frees it when this process dies.

    Raises TrainingError, which names the holder, when another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise TrainingError(
                f"{path.name} is being trained by another process: {file.read().strip() or 'it has just started'}. "
                "Wait for it, or stop it: its checkpoint is kept and the next run resumes from it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}, {shlex.join(sys.argv)}\n")
        file.flush()
        yield
