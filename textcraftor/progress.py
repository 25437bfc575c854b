"""Progress of a loop: a bar on a terminal, and elsewhere a line now and then, such as `generate images: 384/1024`."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

SECONDS = 10.0  # between two lines
LINE = r"^(?P<what>\S.*): (?P<done>\d+)/(?P<total>\d+)$"  # how a program that reads the lines finds them

Item = TypeVar("Item")


class Counter:
    """Shows on standard error how many of `total` are done, as a context manager. quiet: show nothing, as ranks above 0 do."""

    def __init__(self, what: str, total: int, quiet: bool = False, done: int = 0, console: Console | None = None):
        self.what, self.total, self.done = what, total, done
        self._console = console or Console(stderr=True, quiet=quiet)
        self._bar = Progress(console=self._console, transient=True, disable=quiet or not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._shown = time.monotonic()

    def __enter__(self) -> "Counter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count
        self._bar.advance(self._task, count)
        if not self._console.is_terminal and time.monotonic() - self._shown >= SECONDS:
            self._shown = time.monotonic()
            self._console.print(f"{self.what}: {self.done}/{self.total}", highlight=False, soft_wrap=True)


def counted(items: Sequence[Item], what: str, quiet: bool = False) -> Iterator[Item]:
    """The items, one by one, with a counter of those that are done."""
    with Counter(what, len(items), quiet) as counter:
        for item in items:
            yield item
            counter.advance()
