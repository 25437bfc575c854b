"""Run a command and end all of its processes when the process that started it is gone.

    python -I guard.py GRACE COMMAND...

The command gets a process group of its own. The group is sent SIGTERM, and SIGKILL after GRACE seconds, when standard
input closes, which the kernel does for a parent that died in any way, `kill -9` included. Processes that the command
leaves behind when it ends by itself are ended too. Exits with the command's status. Standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

GRACE = 8.0  # seconds between SIGTERM and SIGKILL for commands with nothing large to save


def start(command: list[str], grace: float = GRACE, **options: Any) -> "subprocess.Popen[str]":
    """Start a command under a guard. Its processes end with `end`, or with this process.

    grace: seconds between SIGTERM and SIGKILL.  options: Popen's.
    """
    guard = [sys.executable, "-I", str(Path(__file__).resolve()), str(grace), *command]
    process: subprocess.Popen[str] = subprocess.Popen(
        guard, stdin=subprocess.PIPE, start_new_session=True, text=True, errors="replace", **options
    )
    return process


def end(*processes: "subprocess.Popen[str]") -> None:
    """End guarded commands, all at once, and wait until none of their processes is left."""
    for process in processes:
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.close()
    for process in processes:
        process.wait()


def main(grace: float, command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    ending = threading.Lock()

    def end_group() -> None:
        """Whoever comes second waits for the first, and finds nothing left to signal."""
        with ending:
            if not _is_alive(child.pid):
                return
            _signal(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and _is_alive(child.pid):
                time.sleep(0.1)
            _signal(child.pid, signal.SIGKILL)

    def end_with_standard_input() -> None:
        while os.read(0, 4096):
            pass
        end_group()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: threading.Thread(target=end_group).start())
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    status = child.wait()
    end_group()
    return status if status >= 0 else 128 - status


def _signal(group: int, number: int) -> bool:
    """Whether there was a process to signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS: only zombies are left
        return False
    return True


def _is_alive(group: int) -> bool:
    """Whether a process of the group runs. Zombies do not count: in a container nobody may ever reap them."""
    if not _signal(group, 0):
        return False
    if not Path("/proc/self/stat").exists():
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
