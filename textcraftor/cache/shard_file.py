"""One shard of a store: a safetensors file of rows, each with its digest, that proves what it is.

    8 bytes    length of the header
    header     JSON: the tensors `digests` (n, 32) and `rows` (n, ...), and in its metadata `key` and `digest`
    digests    sha256 of each row's bytes
    rows       the rows

key: the sha256 of all that the rows were made from; another key, and they are stale.  digest: the sha256 of the rows'
kind and of `digests`, and by way of these of every byte; so a reader that wants one row checks one row.
The header is written by hand (the format has a few lines): the same rows give the same bytes whatever the version of a
library, and a file is proven by writing it anew.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DIGEST = 32  # bytes of a sha256
DTYPES = {"float32": torch.float32, "float16": torch.float16}
NAMES = {"float32": "F32", "float16": "F16"}  # in a safetensors header

Stamp = tuple[int, int, int]
"""A file's inode, size and time of change: another stamp, and it has to be looked at again."""


class Damaged(Exception):
    """A file is not the shard it must be; the message says why. It never leaves the store."""


@dataclass(frozen=True)
class Kind:
    """What a row is. dtype: of `DTYPES`."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, rows: Tensor) -> "Kind":
        """rows: (n, ...)."""
        return cls(tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def empty(self, rows: int) -> Tensor:
        """Room for so many rows."""
        return torch.empty((rows, *self.shape), dtype=DTYPES[self.dtype])


def size(kind: Kind, rows: int) -> int:
    """Bytes of a shard's file."""
    return len(_header(rows, kind, "0" * 64, "0" * 64)) + rows * (DIGEST + kind.bytes)


def encode(rows: Tensor, key: str) -> tuple[str, bytes, memoryview]:
    """(digest, what precedes the rows in the file, the rows' bytes).  rows: (n, ...), on the CPU."""
    kind, buffer = Kind.of(rows), buffer_of(rows)
    parts = (buffer[i * kind.bytes : (i + 1) * kind.bytes] for i in range(len(rows)))
    table = b"".join(hashlib.sha256(part).digest() for part in parts)
    digest = _seal(kind, table)
    return digest, _header(len(rows), kind, key, digest) + table, buffer


def verified(path: Path, key: str, rows: int, expected: Kind | None = None) -> str:
    """The digest of a shard, once every byte of its file is proven.

    expected: what its rows must be, where that is known beforehand.
    Raises Damaged when it is missing, stale, or differs by a single bit from what would be written now.
    """
    with _mapped(path) as (mapped, _):
        kind = _claimed_kind(mapped, key, rows)
        if expected not in (None, kind):
            raise Damaged(f"its rows are {kind.dtype} {kind.shape}")
        if len(mapped) != size(kind, rows):
            raise Damaged("it is of another length than its header says")
        stored = kind.empty(rows)
        start = len(mapped) - rows * kind.bytes
        buffer_of(stored)[:] = mapped[start:]
        digest, head, _ = encode(stored, key)
        if mapped[:start] != head:
            raise Damaged("its bytes are not those that were written")
        return digest


def kind_of(path: Path, key: str, rows: int) -> Kind:
    """What the rows of a shard are that is whole."""
    with _mapped(path) as (mapped, _):
        return _claimed_kind(mapped, key, rows)


def read_rows(
    path: Path, places: Sequence[int], into: memoryview, key: str, digest: str, kind: Kind, rows: int, trusted: Stamp | None
) -> Stamp:
    """Copy rows of a shard, each proven by its own digest: beside the table of digests only their bytes are read.

    places: of the rows in the shard.  into: room for them, in that order.  trusted: the stamp under which the table was
    proven before.  Returns the stamp of now.  Raises Damaged as `verified` does.
    """
    header = _header(rows, kind, key, digest)
    start = len(header) + rows * DIGEST
    with _mapped(path) as (mapped, stamp):
        if len(mapped) != start + rows * kind.bytes:
            raise Damaged(f"it has {len(mapped)} bytes instead of {start + rows * kind.bytes}")
        if stamp != trusted and (mapped[: len(header)] != header or _seal(kind, mapped[len(header) : start]) != digest):
            raise Damaged("its header or its table of digests is not the one that was written")
        for place in places:
            _fetch_ahead(mapped, start + place * kind.bytes, kind.bytes)
        for number, place in enumerate(places):
            room = into[number * kind.bytes : (number + 1) * kind.bytes]
            room[:] = mapped[start + place * kind.bytes : start + (place + 1) * kind.bytes]
            entry = len(header) + place * DIGEST
            # What is hashed is the copy that is used, whatever becomes of the file meanwhile.
            if hashlib.sha256(room).digest() != mapped[entry : entry + DIGEST]:
                raise Damaged(f"row {place} of it is not the one that was written")
    return stamp


def buffer_of(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return rows.flatten().view(torch.uint8).numpy().data


def _claimed_kind(mapped: mmap.mmap, key: str, rows: int) -> Kind:
    """What the header says the rows are; nothing of it is believed before it is checked."""
    try:
        header = json.loads(mapped[8 : 8 + int.from_bytes(mapped[:8], "little")])
        found, (count, *shape) = header["__metadata__"]["key"], header["rows"]["shape"]
        dtype = {name: dtype for dtype, name in NAMES.items()}[header["rows"]["dtype"]]
    except (ValueError, KeyError, TypeError):
        raise Damaged("its header cannot be read") from None
    if found != key:
        raise Damaged("it belongs to other prompts, base or settings")
    if count != rows or not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise Damaged(f"it holds {count} rows of shape {shape}, and {rows} are needed")
    return Kind(tuple(shape), dtype)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[tuple[mmap.mmap, Stamp]]:
    """A file's bytes, mapped only while they are read: no file stays open, no page stays this process's."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not status.st_size:
                raise Damaged("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped, (status.st_ino, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        raise Damaged("it does not exist") from None
    except OSError as error:
        raise Damaged(f"it cannot be read ({error.strerror})") from None


def _fetch_ahead(mapped: mmap.mmap, start: int, length: int) -> None:
    """Ask for a row's pages in one go: left to page faults, they come one by one and with neighbours nobody wants."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if length:
        mapped.madvise(mmap.MADV_WILLNEED, first, start + length - first)


def _header(rows: int, kind: Kind, key: str, digest: str) -> bytes:
    table, end = rows * DIGEST, rows * (DIGEST + kind.bytes)
    header = {
        "__metadata__": {"digest": digest, "key": key},
        "digests": {"dtype": "U8", "shape": [rows, DIGEST], "data_offsets": [0, table]},
        "rows": {"dtype": NAMES[kind.dtype], "shape": [rows, *kind.shape], "data_offsets": [table, end]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the rows are aligned
    return len(text).to_bytes(8, "little") + text


def _seal(kind: Kind, table: bytes) -> str:
    return hashlib.sha256(f"{kind.dtype} {kind.shape}\n".encode() + table).hexdigest()
