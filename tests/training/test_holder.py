"""A mix is trained by one process at a time, and the second says by whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from textcraftor.errors import TrainingError
from textcraftor.layout import training_lock
from textcraftor.training.holder import sole_holder

HOLD = """
import sys
from pathlib import Path
from textcraftor.training.holder import sole_holder
with sole_holder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_says_who_holds_it_until_that_one_dies(tmp_path: Path) -> None:
    lock = tmp_path / training_lock("train", "balanced")
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "held\n"
    said = rf"train@balanced is being trained by another process: process {first.pid}, -c"
    with pytest.raises(TrainingError, match=said), sole_holder(lock):
        pass
    with sole_holder(tmp_path / training_lock("train", "aesthetic")):
        pass  # another mix
    first.kill()
    first.wait()
    with sole_holder(lock):
        assert str(os.getpid()) in lock.read_text()
