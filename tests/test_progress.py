"""Progress without a terminal is a line now and then, which a program can read."""

import io
import re

import pytest
from rich.console import Console

from textcraftor import progress
from textcraftor.progress import LINE, Counter, counted


def test_without_a_terminal_there_is_a_line_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))  # 4 seconds from call to call
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with Counter("generate images", 12, done=2, console=Console(file=stream)) as counter:
        for _ in range(5):
            counter.advance(2)
    lines = stream.getvalue().splitlines()
    assert lines and len(lines) < 5
    found = [re.match(LINE, line) for line in lines]
    assert all(match and match["what"] == "generate images" and match["total"] == "12" for match in found)
    assert lines[0] == "generate images: 8/12"


def test_the_items_are_the_same_and_quiet_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    assert list(counted([3, 1, 2], "items", quiet=True)) == [3, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(counted([3, 1, 2], "items")) == [3, 1, 2]
    assert capsys.readouterr().err.splitlines() == ["items: 1/3", "items: 2/3", "items: 3/3"]
