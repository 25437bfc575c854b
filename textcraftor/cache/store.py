"""A store of rows too many to be loaded: shards of a fixed number of rows, read by memory map.

    FOLDER/index.json            what made the rows; of each shard its key and digest
    FOLDER/00000.safetensors     see `shard`
    FOLDER/00001.safetensors ...

`fill` makes a store whole and computes no shard that is whole already, wherever it was interrupted. `Store` reads it: at
opening it holds the index against what is wanted and the files' lengths against the index; from then on it proves each
row as it is read, by the digest that the shard, its table of digests and the index vouch for. So nothing is read twice,
no row is used that is not the one that was computed, and damage that comes later is found as well.
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
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from textcraftor.artifact import write_json, written_aside
from textcraftor.cache import shard_file
from textcraftor.cache.shard_file import Damaged, Kind, Stamp
from textcraftor.distributed.work_split import Shares
from textcraftor.errors import StoreError

INDEX = "index.json"
AGAIN = "Run `textcraftor prepare` (or `dvc repro prepare`)"


class Rows(Protocol):
    """Rows by number: a tensor, a store, or what computes them when they are asked for."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """(B, ...) of the rows in a list or slice."""
        ...


@dataclass(frozen=True)
class Content:
    """What a store is to hold.

    made_by: all that the rows are made by, beside the columns.  columns: of `table`, one row a row of the store; with
    `made_by` they are a shard's key, so that a shard is stale when its own rows are, and not when others change.
    """

    made_by: Mapping[str, Any]
    table: pl.DataFrame
    shard_rows: int

    @property
    def shards(self) -> range:
        """Their numbers."""
        return range(-(-self.table.height // self.shard_rows))

    def rows(self, number: int) -> int:
        """How many rows a shard holds; the last one may hold fewer."""
        return min(self.shard_rows, self.table.height - number * self.shard_rows)

    def key(self, number: int) -> str:
        """sha256 of what a shard's rows are made from: no time, no path, nothing of other shards."""
        columns = self.table.slice(number * self.shard_rows, self.shard_rows).to_dict(as_series=False)
        return hashlib.sha256(json.dumps([self.made_by, columns], sort_keys=True).encode()).hexdigest()

    def size(self, kind: Kind) -> int:
        """Bytes that the store takes on the disk, its index aside."""
        return sum(shard_file.size(kind, self.rows(number)) for number in self.shards)


def fill(
    folder: Path,
    content: Content,
    compute: Callable[[slice], Tensor],
    batch_size: int,
    kind: Kind | None = None,
    shares: Shares | None = None,
) -> int:
    """Make the store at `folder` hold `content`; returns how many shards had to be computed, in all processes.

    compute: rows -> (B, ...) of at most `batch_size` rows, which never span two shards: who computes what, and what was
    there before, changes no batch, and so no bit.  kind: what the rows must be, where that is known beforehand.
    Of several processes each computes its share of what is missing, and the first one writes the index, last of all.
    What else lies in the folder is removed.
    Raises StoreError when the disk is full or a row is not finite: shards that are written stay, and are not computed again.
    """
    shares = shares or Shares()
    folder.mkdir(parents=True, exist_ok=True)
    digests = torch.zeros(len(content.shards), shard_file.DIGEST, dtype=torch.uint8)

    def note(number: int, digest: str) -> None:
        digests[number] = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)

    with Progress(console=Console(stderr=True, quiet=shares.rank > 0), transient=True) as progress:
        for number in progress.track(shares.own(content.shards), description=f"verify {folder.name}"):
            with contextlib.suppress(Damaged):
                note(number, shard_file.verified(_path(folder, number), content.key(number), content.rows(number), kind))
        missing = [number for number, digest in enumerate(shares.pooled(digests)) if not digest.any()]
        own = shares.own(missing)
        bar = progress.add_task(f"compute {folder.name}", total=sum(map(content.rows, own)))
        for number in own:
            batches = []
            first, end = number * content.shard_rows, number * content.shard_rows + content.rows(number)
            for start in range(first, end, batch_size):
                batches.append(compute(slice(start, min(start + batch_size, end))))
                progress.advance(bar, len(batches[-1]))
            note(number, _write(folder, number, torch.cat(batches), content))
    shares.pooled(digests)
    if shares.rank == 0:
        _finish(folder, content, [bytes(digest.tolist()).hex() for digest in digests])
    shares.wait()
    return len(missing)


class Store:
    """The rows of a filled store: `store[[7, 3]]`, `store[8:16]`; each is proven before it is handed out."""

    def __init__(self, folder: Path, content: Content):
        """Raises StoreError when the store is missing, holds other content, or has lost a file or a part of one."""
        self._folder, self._content = folder, content
        self.kind, made, self._shards = _read_index(folder)
        self._proven: dict[int, Stamp] = {}
        wanted = [content.key(number) for number in content.shards]
        if made != (content.table.height, content.shard_rows) or [key for key, _ in self._shards] != wanted:
            raise StoreError(f"{folder} belongs to other prompts, base or settings. {AGAIN} first")
        for number in content.shards:
            path, size = _path(folder, number), shard_file.size(self.kind, content.rows(number))
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "it does not exist" if found is None else f"it has {found} bytes instead of {size}"
                raise _damage(path, state)

    def __len__(self) -> int:
        return self._content.table.height

    @property
    def shape(self) -> tuple[int, ...]:
        """As of one tensor that held all rows."""
        return (len(self), *self.kind.shape)

    def __getitem__(self, rows: slice | Sequence[int], /) -> Tensor:
        """(B, ...) in the order asked for; each shard is opened once. Raises StoreError when a row is damaged."""
        wanted = np.array(range(len(self))[rows] if isinstance(rows, slice) else rows, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of a store of {len(self)}")
        order = np.argsort(wanted, kind="stable")
        by_shard = wanted[order] // self._content.shard_rows
        found, size = self.kind.empty(len(wanted)), self.kind.bytes
        buffer = shard_file.buffer_of(found)
        for number in np.unique(by_shard):
            first, last = np.searchsorted(by_shard, number), np.searchsorted(by_shard, number, side="right")
            places = (wanted[order[first:last]] % self._content.shard_rows).tolist()
            self._read(int(number), places, buffer[first * size : last * size])
        in_order = bool((np.diff(order) > 0).all())  # as of a slice: no copy
        return found if in_order else found[torch.from_numpy(np.argsort(order))]

    def _read(self, number: int, places: Sequence[int], into: memoryview) -> None:
        path, (key, digest) = _path(self._folder, number), self._shards[number]
        count, trusted = self._content.rows(number), self._proven.get(number)
        try:
            self._proven[number] = shard_file.read_rows(path, places, into, key, digest, self.kind, count, trusted)
        except Damaged as damage:
            raise _damage(path, str(damage)) from None


def bytes_on_disk(folder: Path) -> int:
    """Of all that lies in a folder; 0 when there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Remove what else lies in a folder: left by a run that was killed, or of other content."""
    kept = set(names)
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(folder: Path, number: int, rows: Tensor, content: Content) -> str:
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


def _finish(folder: Path, content: Content, digests: Sequence[str]) -> None:
    """Leave exactly what the content asks for. Nobody writes here any more."""
    keys = [content.key(number) for number in content.shards]
    kind = shard_file.kind_of(_path(folder, 0), keys[0], content.rows(0))
    index = {
        "made_by": dict(content.made_by),
        "rows": content.table.height,
        "shard_rows": content.shard_rows,
        "shape": list(kind.shape),
        "dtype": kind.dtype,
        "shards": [{"key": key, "digest": digest} for key, digest in zip(keys, digests, strict=True)],
    }
    write_json(folder / INDEX, index)
    keep_only(folder, [INDEX, *(_path(folder, number).name for number in content.shards)])


def _read_index(folder: Path) -> tuple[Kind, tuple[int, int], list[tuple[str, str]]]:
    """(what a row is, (rows, rows of a shard), (key, digest) of each shard)."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kind = Kind(tuple(map(int, index["shape"])), index["dtype"])
        shard_file.DTYPES[kind.dtype]  # a KeyError for another
        shards = [(each["key"], each["digest"]) for each in index["shards"]]
        return kind, (index["rows"], index["shard_rows"]), shards
    except FileNotFoundError:
        raise StoreError(f"{folder} does not exist, or is not finished. {AGAIN} first") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is damaged, or not of a store. {AGAIN} first") from None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def _damage(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}. {AGAIN}: it computes that shard anew, and training goes on")
