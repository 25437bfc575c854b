"""Nothing that is started outlives who started it."""

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

# A command with a child of its own, like dvc with a training; both write down who they are.
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


def test_end_takes_the_whole_family(tmp_path: Path, family: list[str]) -> None:
    process = guard.start(family, cwd=tmp_path)
    members = wait_for_members(tmp_path)
    assert all(map(alive, members))
    guard.end(process)
    assert all_gone(members, 1)


def test_a_killed_starter_takes_the_family_with_it(tmp_path: Path, family: list[str]) -> None:
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


def test_what_a_command_leaves_behind_goes_too(tmp_path: Path) -> None:
    leave = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True)"
    process = guard.start([sys.executable, "-c", leave], stdout=subprocess.PIPE)
    assert process.stdout
    left = int(process.stdout.readline())
    assert process.wait(20) == 0
    assert all_gone([left], 1)


@pytest.mark.parametrize(("code", "status"), [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_the_commands(code: str, status: int) -> None:
    assert guard.start([sys.executable, "-c", code]).wait(20) == status
