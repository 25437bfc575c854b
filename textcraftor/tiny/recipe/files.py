"""Writing results so that what is there is whole: first aside, then renamed."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is either absent or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
    aside.replace(path)


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A new empty folder to fill, put in the place of `folder` once filled; if filling fails, `folder` stays as it was."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for file in aside.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner's eyes only
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)
