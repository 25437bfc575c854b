"""Why a file of weights cannot be used, found by looking at the file: what libraries say about it is often misleading."""

import json
from pathlib import Path
from typing import Final

_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_PRECISIONS: Final = ("fp16", "bf16")


def fault_of(path: Path) -> str:
    """What is wrong with a file or a folder of files, in a clause with what to do next; empty where nothing shows."""
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return next((f"{each} {fault}" for each in files if (fault := _fault(each))), "")


def other_weights(folder: Path) -> str:
    """The weights that a folder holds in place of those that are read, in a clause; empty where it holds none."""
    names = sorted(each.name for each in folder.iterdir() if each.suffix in (".safetensors", ".bin", ".ckpt", ".pt"))
    if not names or any(name.count(".") == 1 and name.endswith(".safetensors") for name in names):
        return ""
    return f"{folder} holds {', '.join(names)} and no weights that can be read: needed are .safetensors, plain or fp16 or bf16"


def variant_of(folder: Path) -> str | None:
    """The precision ("fp16", "bf16") of a folder whose weights exist in that precision only; None for any other folder."""
    names = {each.name for each in folder.glob("*.safetensors")}
    if any(name.count(".") == 1 for name in names):  # model.safetensors, or shards without a variant
        return None
    return next((each for each in _PRECISIONS if any(f".{each}." in name or f".{each}-" in name for name in names)), None)


def _fault(path: Path) -> str:
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(200)
        if start.startswith(_POINTER):
            return "is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository"
        if path.suffix != ".safetensors":
            return ""
        if size < 8:
            return f"is {'empty' if size == 0 else 'truncated'}. Download it again"
        if start.lstrip()[:1] == b"<":
            return "is a web page, not weights: the download was answered with a page. Download it again"
        if start[:2] == b"PK" or start[:1] == b"\x80":
            return "is a pickled torch file that was renamed to .safetensors. Convert it; we unpickle nothing"
        length = int.from_bytes(start[:8], "little")
        if length > size - 8:
            return f"is truncated or no safetensors file: {size:,} bytes. Download it again"
        file.seek(8)
        try:
            tensors = json.loads(file.read(length))
            end = max((int(each["data_offsets"][1]) for name, each in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            return "is damaged: its header cannot be read. Download it again"
    if 8 + length + end > size:
        return f"is truncated: {size:,} bytes of {8 + length + end:,}. Download it again"
    return ""
