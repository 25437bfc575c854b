"""Preemption: SIGTERM asks a run to make way. It writes its checkpoint and exits with status 75.

A cluster that takes a machine back, `docker stop` and `kill` all send SIGTERM, and SIGKILL some seconds later. The run
stops between two micro batches, so it needs no more time than one of them and a checkpoint.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Notice:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.given = False


@contextlib.contextmanager
def watching() -> Iterator[Notice]:
    """A notice that SIGTERM sets, while the block runs. Only the main thread can watch; elsewhere nothing changes."""
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return

    def note(signum: int, frame: object) -> None:
        notice.given = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
