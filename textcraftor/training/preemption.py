"""Preemption: SIGTERM asks a run to stop. It writes its checkpoint and exits with status 75.

A cluster that reclaims a machine, `docker stop` and `kill` all send SIGTERM, and SIGKILL some seconds later. The run
stops between two micro batches, so it needs no more time than one micro batch and a checkpoint.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def catch_sigterm() -> Iterator[StopRequest]:
    """Set the yielded request on SIGTERM while the block runs. Outside the main thread signals cannot be caught: no effect."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
