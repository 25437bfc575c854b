"""Commands under a guard end with the process that started them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tasks import guard

# A command with a child of its own, as dvc has a training; both write their process ids.
FAMILY = """
import os, pathlib, subprocess, sys, time
pathlib.Path("parent").write_text(str(os.getpid()))
child = "import os, pathlib, time; pathlib.Path('child').write_text(str(os.getpid())); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""


@pytest.fixture
def family(tmp_path: Path) -> list[str]:
    (tmp_path / "family.py").write_text(FAMILY)
    return [sys.executable, "family.py"]


def wait_for_members(folder: Path) -> list[int]:
    for _ in range(600):
        texts = [(folder / name).read_text() if (folder / name).exists() else "" for name in ("parent", "child")]
        if all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError("the command did not start")


def alive(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_gone(members: list[int], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, members)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, members))


def test_end_ends_the_command_and_its_children(tmp_path: Path, family: list[str]) -> None:
    process = guard.start(family, cwd=tmp_path)
    members = wait_for_members(tmp_path)
    assert all(map(alive, members))
    guard.end(process)
    assert all_gone(members, 1)


def test_the_command_ends_when_its_starter_is_killed(tmp_path: Path, family: list[str]) -> None:
    starter = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(guard.__file__).parents[1])!r})
        from tasks import guard
        guard.start({family!r})
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", starter], cwd=tmp_path)
    members = wait_for_members(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert all_gone(members)


def test_children_that_a_command_leaves_behind_end(tmp_path: Path) -> None:
    leave = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True)"
    process = guard.start([sys.executable, "-c", leave], stdout=subprocess.PIPE)
    assert process.stdout
    left = int(process.stdout.readline())
    assert process.wait(20) == 0
    assert all_gone([left], 1)


@pytest.mark.parametrize(("code", "status"), [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_is_that_of_the_command(code: str, status: int) -> None:
    assert guard.start([sys.executable, "-c", code]).wait(20) == status


# Writes "saved" so many seconds after SIGTERM.
SAVER = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(float(sys.argv[1]))
    pathlib.Path("saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
pathlib.Path("parent").write_text("0")
pathlib.Path("child").write_text("0")
time.sleep(60)
"""


@pytest.mark.parametrize(("grace", "seconds", "saved"), [(60.0, 0.5, True), (0.2, 30, False)])
def test_a_command_has_its_grace_to_save_and_no_more(tmp_path: Path, grace: float, seconds: float, saved: bool) -> None:
    process = guard.start([sys.executable, "-c", SAVER, str(seconds)], grace, cwd=tmp_path)
    wait_for_members(tmp_path)
    guard.end(process)
    assert (tmp_path / "saved").exists() == saved
    assert process.returncode == (75 if saved else 137)


def test_several_commands_are_ended_at_once(tmp_path: Path) -> None:
    """The second is sent SIGTERM while the first still saves: it has ended, though the first never does."""
    folders = [tmp_path / "first", tmp_path / "second"]
    processes = []
    for folder, seconds in zip(folders, ("30", "0"), strict=True):
        folder.mkdir()
        processes.append(guard.start([sys.executable, "-c", SAVER, seconds], 2.0, cwd=folder))
    for folder in folders:
        wait_for_members(folder)
    guard.end(*processes)
    assert [process.returncode for process in processes] == [137, 75]
