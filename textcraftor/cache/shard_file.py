"""One shard of a store: a safetensors file of rows, each with its digest, that can be verified on its own.

    8 bytes    length of the header
    header     JSON: the tensors `digests` (n, 32) and `rows` (n, ...), and in its metadata `key` and `digest`
    digests    sha256 of each row's bytes
    rows       the rows

key: sha256 of everything the rows were computed from; with another key they are stale.  digest: sha256 of the row
format and of `digests`. It covers every byte of the rows through their digests, so a reader of one row checks that row.
The header is written here and not by the safetensors library (the format has a few lines): the same rows give the same
bytes whatever the library's version, and a file is verified by encoding it again.
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

DIGEST_BYTES = 32  # length of a sha256
DTYPES = {"float32": torch.float32, "float16": torch.float16}
HEADER_DTYPES = {"float32": "F32", "float16": "F16"}  # as a safetensors header names them

FileStamp = tuple[int, int, int]
"""Inode, size and modification time of a file. When one of them changes the file must be verified again."""


class DamagedShard(Exception):
    """A file is not the shard it should be; the message says why. The store turns it into a StoreError."""


@dataclass(frozen=True)
class RowFormat:
    """Shape and dtype of one row. dtype: a key of `DTYPES`."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of_tensor(cls, rows: Tensor) -> "RowFormat":
        """The format of rows (n, ...)."""
        return cls(tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))

    @property
    def bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def allocate(self, rows: int) -> Tensor:
        """An uninitialised tensor of that many rows."""
        return torch.empty((rows, *self.shape), dtype=DTYPES[self.dtype])


def file_size(row_format: RowFormat, rows: int) -> int:
    """Size of a shard's file in bytes."""
    return len(_header(rows, row_format, "0" * 64, "0" * 64)) + rows * (DIGEST_BYTES + row_format.bytes)


def encode(rows: Tensor, key: str) -> tuple[str, bytes, memoryview]:
    """(digest, the bytes before the rows in the file, the rows' bytes).  rows: (n, ...), contiguous on the CPU."""
    row_format, buffer = RowFormat.of_tensor(rows), byte_view(rows)
    parts = (buffer[i * row_format.bytes : (i + 1) * row_format.bytes] for i in range(len(rows)))
    row_digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    digest = _shard_digest(row_format, row_digests)
    return digest, _header(len(rows), row_format, key, digest) + row_digests, buffer


def verify(path: Path, key: str, rows: int, expected: RowFormat | None = None) -> str:
    """Check every byte of a shard and return its digest.

    expected: the row format, where the caller knows it.
    Raises DamagedShard if the file is missing, stale, or differs by a bit from what would be written now.
    """
    with _open_mmap(path) as (mapped, _):
        row_format = _parse_header(mapped, key, rows)
        if expected not in (None, row_format):
            raise DamagedShard(f"its rows are {row_format.dtype} {row_format.shape}")
        if len(mapped) != file_size(row_format, rows):
            raise DamagedShard("it is of another length than its header says")
        stored = row_format.allocate(rows)
        start = len(mapped) - rows * row_format.bytes
        byte_view(stored)[:] = mapped[start:]
        digest, head, _ = encode(stored, key)
        if mapped[:start] != head:
            raise DamagedShard("its bytes are not those that were written")
        return digest


def read_row_format(path: Path, key: str, rows: int) -> RowFormat:
    """The row format of an undamaged shard. Raises DamagedShard as `verify` does, from the header alone."""
    with _open_mmap(path) as (mapped, _):
        return _parse_header(mapped, key, rows)


def read_rows(
    path: Path,
    positions: Sequence[int],
    out: memoryview,
    key: str,
    digest: str,
    row_format: RowFormat,
    rows: int,
    verified: FileStamp | None,
) -> FileStamp:
    """Copy rows of a shard into `out` and check each by its digest. Only those rows and the row digests are read.

    positions: rows within the shard, in the order of `out`.  verified: the stamp under which the row digests were
    checked before, if they were.  Returns the current stamp.  Raises DamagedShard as `verify` does.
    """
    header = _header(rows, row_format, key, digest)
    start = len(header) + rows * DIGEST_BYTES
    with _open_mmap(path) as (mapped, stamp):
        if len(mapped) != start + rows * row_format.bytes:
            raise DamagedShard(f"it has {len(mapped)} bytes instead of {start + rows * row_format.bytes}")
        if stamp != verified and (
            mapped[: len(header)] != header or _shard_digest(row_format, mapped[len(header) : start]) != digest
        ):
            raise DamagedShard("its header or its table of digests is not the one that was written")
        for position in positions:
            _prefetch(mapped, start + position * row_format.bytes, row_format.bytes)
        for index, position in enumerate(positions):
            row = out[index * row_format.bytes : (index + 1) * row_format.bytes]
            row[:] = mapped[start + position * row_format.bytes : start + (position + 1) * row_format.bytes]
            entry = len(header) + position * DIGEST_BYTES
            # The copy is hashed, not the file: the file could change in between.
            if hashlib.sha256(row).digest() != mapped[entry : entry + DIGEST_BYTES]:
                raise DamagedShard(f"row {position} of it is not the one that was written")
    return stamp


def byte_view(rows: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    return rows.flatten().view(torch.uint8).numpy().data


def _parse_header(mapped: mmap.mmap, key: str, rows: int) -> RowFormat:
    """The row format that the header claims. Raises DamagedShard for an unreadable header, another key or row count."""
    try:
        header = json.loads(mapped[8 : 8 + int.from_bytes(mapped[:8], "little")])
        found_key, (count, *shape) = header["__metadata__"]["key"], header["rows"]["shape"]
        dtype = {name: dtype for dtype, name in HEADER_DTYPES.items()}[header["rows"]["dtype"]]
    except (ValueError, KeyError, TypeError):
        raise DamagedShard("its header cannot be read") from None
    if found_key != key:
        raise DamagedShard("it belongs to other prompts, base or settings")
    if count != rows or not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise DamagedShard(f"it holds {count} rows of shape {shape}, and {rows} are needed")
    return RowFormat(tuple(shape), dtype)


@contextlib.contextmanager
def _open_mmap(path: Path) -> Iterator[tuple[mmap.mmap, FileStamp]]:
    """A file's bytes, mapped only while the block runs: no file stays open, no page stays in this process's memory."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not status.st_size:
                raise DamagedShard("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped, (status.st_ino, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        raise DamagedShard("it does not exist") from None
    except OSError as error:
        raise DamagedShard(f"it cannot be read ({error.strerror})") from None


def _prefetch(mapped: mmap.mmap, start: int, length: int) -> None:
    """Request a row's pages in one call: page faults would load them one by one, with unneeded neighbours."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if length:
        mapped.madvise(mmap.MADV_WILLNEED, first, start + length - first)


def _header(rows: int, row_format: RowFormat, key: str, digest: str) -> bytes:
    digests_end, end = rows * DIGEST_BYTES, rows * (DIGEST_BYTES + row_format.bytes)
    header = {
        "__metadata__": {"digest": digest, "key": key},
        "digests": {"dtype": "U8", "shape": [rows, DIGEST_BYTES], "data_offsets": [0, digests_end]},
        "rows": {
            "dtype": HEADER_DTYPES[row_format.dtype],
            "shape": [rows, *row_format.shape],
            "data_offsets": [digests_end, end],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the rows
    return len(text).to_bytes(8, "little") + text


def _shard_digest(row_format: RowFormat, row_digests: bytes) -> str:
    return hashlib.sha256(f"{row_format.dtype} {row_format.shape}\n".encode() + row_digests).hexdigest()
