"""A mix is trained by one process at a time, and the second says by whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_stages import CPU, run
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config
from textcraftor.errors import TrainingError
from textcraftor.layout import training_lock
from textcraftor.training.holder import sole_holder
from textcraftor.training.stages import train_text_encoder

__all__ = ["run"]  # a fixture

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


def test_a_mix_that_another_process_trains_is_left_to_it(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    with (
        sole_holder(tmp_path / training_lock("train", "redder")),
        pytest.raises(TrainingError, match="train@redder is being trained by another process: process"),
    ):
        train_text_encoder(run, "redder", tmp_path, CPU)
    assert not (tmp_path / "data/encoders/redder").exists()
