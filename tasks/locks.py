"""DVC's own record of which process works on which path, freed of entries whose process is gone.

DVC removes an entry only when nobody has its process ID. After a crash of the machine or in a container somebody else may
have it, and the stage would be busy for ever. A record that was cut off by a crash blocks every stage.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
from dvc.lock import LockError, make_lock
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK, SCHEMA
from voluptuous import Invalid


def drop_dead_locks(workspace: Path) -> None:
    """Remove from the workspace's record what no DVC process holds. Does nothing while DVC is writing the record."""
    folder = workspace / ".dvc/tmp"
    path = folder / RWLOCK_FILE
    if not path.is_file():
        return
    with contextlib.suppress(LockError), make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder)):
        try:
            held = SCHEMA(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, Invalid):  # cut off, or not DVC's
            path.unlink()
            return
        alive = {
            "write": {where: entry for where, entry in held["write"].items() if _is_held(entry)},
            "read": {where: kept for where, entries in held["read"].items() if (kept := list(filter(_is_held, entries)))},
        }
        if alive != {mode: dict(held[mode]) for mode in alive}:
            path.write_text(json.dumps(alive), encoding="utf-8")


def _is_held(entry: dict[str, Any]) -> bool:
    """Whether the process of an entry runs and is one of DVC's. One that does not say what it runs counts as such."""
    try:
        command = psutil.Process(entry["pid"]).cmdline()
        return not command or any("dvc" in argument for argument in command)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
