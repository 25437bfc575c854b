"""A dead man's switch: run a command, and end all of it when whoever asked for it is gone.

    python -I guard.py COMMAND...

The command gets a process group of its own. It is ended (SIGTERM, then SIGKILL) when standard input closes,
which the kernel does for a parent that died in any way, `kill -9` included; and what the command leaves
behind when it ends by itself is ended too. Exits with the command's status. Standard library only.
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

GRACE = 8.0  # seconds between the polite signal and the other one


def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a command under a guard; `end` it, or just die, and all of it goes. Takes Popen's options."""
    guard = [sys.executable, "-I", str(Path(__file__).resolve()), *command]
    process: subprocess.Popen[str] = subprocess.Popen(
        guard, stdin=subprocess.PIPE, start_new_session=True, text=True, errors="replace", **options
    )
    return process


def end(process: "subprocess.Popen[str]") -> None:
    """Close the guard's standard input and wait until nothing of the command is left."""
    assert process.stdin
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait(GRACE + 30)


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)

    def end_group() -> None:
        _signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and _signal_group(child.pid, 0):
            time.sleep(0.1)
        _signal_group(child.pid, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end_group()

    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, lambda *_: threading.Thread(target=end_group).start())
    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    end_group()
    return status if status >= 0 else 128 - status


def _signal_group(group: int, number: int) -> bool:
    """Whether there was anyone to signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS: only zombies are left
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
