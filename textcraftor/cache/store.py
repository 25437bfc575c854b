"""A store of rows too large to load: shards of a fixed number of rows, read by memory map.

    FOLDER/index.json            what the rows were computed from; key and digest of each shard
    FOLDER/00000.safetensors     see `shard_file`
    FOLDER/00001.safetensors ...

`fill` completes a store and computes only missing, stale or damaged shards, wherever it was interrupted. `Store` reads
it. Opening compares the index with the expected content and the files' sizes with the index; each row is then verified
when it is read, by its digest, the shard's digest and the index. Nothing is read twice, a wrong row is never returned,
and damage that happens later is found too.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from textcraftor.artifact import write_json, written_aside
from textcraftor.cache import shard_file
from textcraftor.cache.shard_file import DamagedShard, FileStamp, RowFormat
from textcraftor.distributed.work_split import WorkSplit
from textcraftor.errors import StoreError
from textcraftor.progress import Counter, counted

INDEX = "index.json"
RERUN_HINT = "Run `textcraftor prepare` (or `dvc repro prepare`)"


class Rows(Protocol):
    """Rows by number: a tensor, a store, or an object that computes them on request."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """(B, ...) of the rows in a list or slice."""
        ...


@dataclass(frozen=True)
class StoreContent:
    """What a store should hold.

    made_by: everything the rows depend on besides the table.  table: one row for each row of the store. A shard's key
    covers `made_by` and the shard's own rows of the table, so changes to other rows do not make it stale.
    """

    made_by: Mapping[str, Any]
    table: pl.DataFrame
    shard_rows: int

    @property
    def shards(self) -> range:
        """The shards' numbers."""
        return range(-(-self.table.height // self.shard_rows))

    def rows(self, number: int) -> int:
        """Number of rows of a shard; the last one may have fewer."""
        return min(self.shard_rows, self.table.height - number * self.shard_rows)

    def key(self, number: int) -> str:
        """sha256 of what a shard's rows are computed from: no time, no path, nothing of other shards."""
        columns = self.table.slice(number * self.shard_rows, self.shard_rows).to_dict(as_series=False)
        return hashlib.sha256(json.dumps([self.made_by, columns], sort_keys=True).encode()).hexdigest()

    def size(self, row_format: RowFormat) -> int:
        """Size of the store on disk in bytes, without its index."""
        return sum(shard_file.file_size(row_format, self.rows(number)) for number in self.shards)


def fill(
    folder: Path,
    content: StoreContent,
    compute: Callable[[slice], Tensor],
    batch_size: int,
    row_format: RowFormat | None = None,
    work: WorkSplit | None = None,
) -> int:
    """Make the store at `folder` hold `content`; returns the number of shards that were computed, by all ranks.

    compute: rows -> (B, ...) of at most `batch_size` rows. A batch never spans two shards, so the batches, and with
    them every bit, do not depend on which rank computes what or which shards existed.  row_format: the expected format,
    where it is known beforehand.
    The ranks divide the missing shards among them; rank 0 writes the index last. Other files in the folder are removed.
    Raises StoreError when the disk is full or a row is not finite; shards already written are kept and reused.
    """
    work = work or WorkSplit()
    folder.mkdir(parents=True, exist_ok=True)
    digests = torch.zeros(len(content.shards), shard_file.DIGEST_BYTES, dtype=torch.uint8)

    def record(number: int, digest: str) -> None:
        digests[number] = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)

    quiet = work.rank > 0
    for number in counted(work.items_of_rank(content.shards), f"verify {folder.name}", quiet):
        with contextlib.suppress(DamagedShard):
            record(number, shard_file.verify(_path(folder, number), content.key(number), content.rows(number), row_format))
    missing = [number for number, digest in enumerate(work.all_reduce_max(digests)) if not digest.any()]
    assigned = work.items_of_rank(missing)
    with Counter(f"compute {folder.name}", sum(map(content.rows, assigned)), quiet) as counter:
        for number in assigned:
            batches = []
            first, end = number * content.shard_rows, number * content.shard_rows + content.rows(number)
            for start in range(first, end, batch_size):
                batches.append(compute(slice(start, min(start + batch_size, end))))
                counter.advance(len(batches[-1]))
            record(number, _write_shard(folder, number, torch.cat(batches), content))
    work.all_reduce_max(digests)
    if work.rank == 0:
        _write_index(folder, content, [bytes(digest.tolist()).hex() for digest in digests])
    work.barrier()
    return len(missing)


class Store:
    """The rows of a filled store: `store[[7, 3]]`, `store[8:16]`. Each row is verified before it is returned."""

    def __init__(self, folder: Path, content: StoreContent):
        """Raises StoreError if the store is missing, holds other content, or a file is missing or has another size."""
        self._folder, self._content = folder, content
        self.row_format, size_in_index, self._shards = _read_index(folder)
        self._verified: dict[int, FileStamp] = {}
        keys = [content.key(number) for number in content.shards]
        if size_in_index != (content.table.height, content.shard_rows) or [key for key, _ in self._shards] != keys:
            raise StoreError(f"{folder} belongs to other prompts, base or settings. {RERUN_HINT} first")
        for number in content.shards:
            path, expected = _path(folder, number), shard_file.file_size(self.row_format, content.rows(number))
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = "it does not exist" if found is None else f"it has {found} bytes instead of {expected}"
                raise _damage_error(path, state)

    def __len__(self) -> int:
        return self._content.table.height

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one tensor of all rows."""
        return (len(self), *self.row_format.shape)

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, ...) in the order asked for; each shard is opened once. Raises StoreError when a row is damaged."""
        numbers = np.array(range(len(self))[rows] if isinstance(rows, slice) else rows, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"rows {numbers.min()}..{numbers.max()} of a store of {len(self)}")
        order = np.argsort(numbers, kind="stable")
        by_shard = numbers[order] // self._content.shard_rows
        result, size = self.row_format.allocate(len(numbers)), self.row_format.bytes
        buffer = shard_file.byte_view(result)
        for number in np.unique(by_shard):
            first, last = np.searchsorted(by_shard, number), np.searchsorted(by_shard, number, side="right")
            positions = (numbers[order[first:last]] % self._content.shard_rows).tolist()
            self._read(int(number), positions, buffer[first * size : last * size])
        already_sorted = bool((np.diff(order) > 0).all())  # true for a slice: no copy needed
        return result if already_sorted else result[torch.from_numpy(np.argsort(order))]

    def _read(self, number: int, positions: Sequence[int], out: memoryview) -> None:
        path, (key, digest) = _path(self._folder, number), self._shards[number]
        count, verified = self._content.rows(number), self._verified.get(number)
        try:
            self._verified[number] = shard_file.read_rows(path, positions, out, key, digest, self.row_format, count, verified)
        except DamagedShard as damage:
            raise _damage_error(path, str(damage)) from None


def bytes_on_disk(folder: Path) -> int:
    """Size of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Remove everything else from a folder: leftovers of a killed run or of other content."""
    kept = set(names)
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_shard(folder: Path, number: int, rows: Tensor, content: StoreContent) -> str:
    finite = rows.isfinite().flatten(1).all(1)
    if not finite.all():
        prompt = content.table["prompt"][number * content.shard_rows + int(finite.logical_not().nonzero()[0])]
        raise StoreError(f"{folder.name}: what was computed for prompt {prompt!r} is not finite. Try base.dtype: float32")
    digest, head, body = shard_file.encode(rows, content.key(number))
    path = _path(folder, number)
    try:
        with written_aside(path) as aside, aside.open("wb") as file:
            file.write(head)
            file.write(body)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(f"{path}: no space is left on the disk. Make room and run it again: it goes on from here") from None
    return digest


def _write_index(folder: Path, content: StoreContent, digests: Sequence[str]) -> None:
    """Write the index and remove everything else. Called by rank 0 after all shards are written."""
    keys = [content.key(number) for number in content.shards]
    row_format = shard_file.read_row_format(_path(folder, 0), keys[0], content.rows(0))
    index = {
        "made_by": dict(content.made_by),
        "rows": content.table.height,
        "shard_rows": content.shard_rows,
        "shape": list(row_format.shape),
        "dtype": row_format.dtype,
        "shards": [{"key": key, "digest": digest} for key, digest in zip(keys, digests, strict=True)],
    }
    write_json(folder / INDEX, index)
    keep_only(folder, [INDEX, *(_path(folder, number).name for number in content.shards)])


def _read_index(folder: Path) -> tuple[RowFormat, tuple[int, int], list[tuple[str, str]]]:
    """(row format, (rows, rows of a shard), (key, digest) of each shard)."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        row_format = RowFormat(tuple(map(int, index["shape"])), index["dtype"])
        shard_file.DTYPES[row_format.dtype]  # raises KeyError for an unknown dtype
        shards = [(each["key"], each["digest"]) for each in index["shards"]]
        return row_format, (index["rows"], index["shard_rows"]), shards
    except FileNotFoundError:
        raise StoreError(f"{folder} does not exist, or is not finished. {RERUN_HINT} first") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is damaged, or is not the index of a store. {RERUN_HINT} first") from None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def _damage_error(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}. {RERUN_HINT}: it computes that shard again, and training resumes")
