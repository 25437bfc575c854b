"""Copies that are verified and then loaded from, in a folder that only this process's account can open.

A file that is verified in one place and loaded from there later can be exchanged in between. So what is to be served is
copied first, each file read once; the copy is verified, and the model is loaded from the copy.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path

from textcraftor.layout import VERIFIED


@functools.cache
def private_folder(root: Path) -> Path:
    """This process's folder for copies, in the workspace `root`, on whose disk there is room for weights. It ends with it."""
    parent = root / VERIFIED
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in parent.iterdir():  # of processes that were killed
        if not _is_alive(left.name.partition(".")[0]):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}.", dir=parent))  # readable by this account alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def private_copy(source: Path, into: Path) -> Path:
    """Copy a file or folder, links as links, into a new folder of `into`; returns the copy, under the source's name.

    Raises FileNotFoundError when there is nothing to copy.
    """
    target = Path(tempfile.mkdtemp(dir=into)) / source.name
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)
    return target


def _is_alive(process: str) -> bool:
    with contextlib.suppress(ProcessLookupError, ValueError, PermissionError):
        os.kill(int(process), 0)
        return True
    return False
