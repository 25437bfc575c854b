"""A store computes only missing, stale or damaged shards and returns only verified rows."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import in_processes
from textcraftor.cache import shard_file
from textcraftor.cache.shard_file import RowFormat
from textcraftor.cache.store import Store, StoreContent, fill
from textcraftor.distributed import data_parallel
from textcraftor.errors import StoreError

ROWS, SHARD, BATCH = 22, 8, 4
TABLE = pl.DataFrame({"prompt": [f"prompt {number}" for number in range(ROWS)], "seed": range(ROWS)})
FACTS = {"base": "a" * 64, "chain": {"scheduler": "ddim", "guidance_scale": 7.5}, "switch": 20}


def content(facts: dict[str, Any] = FACTS, table: pl.DataFrame = TABLE, shard_rows: int = SHARD) -> StoreContent:
    return StoreContent(facts, table, shard_rows)


class CountingRows:
    """Computes rows and records which."""

    def __init__(self, table: pl.DataFrame = TABLE, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32):
        self.table, self.shape, self.dtype = table, shape, dtype
        self.batches: list[tuple[int, int]] = []

    def __call__(self, rows: slice) -> Tensor:
        self.batches.append((rows.start, rows.stop))
        seeds = self.table["seed"][rows].to_list()
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(
            self.dtype
        )

    @property
    def all_rows(self) -> Tensor:
        return CountingRows(self.table, self.shape, self.dtype)(slice(0, len(self.table)))

    @property
    def shards(self) -> set[int]:
        return {start // SHARD for start, _ in self.batches}


def fill_store(folder: Path, **settings: Any) -> CountingRows:
    """Fill a store; returns the record of what was computed."""
    made = CountingRows(**settings)
    fill(folder, content(table=made.table), made, BATCH)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A filled store."""
    fill_store(tmp_path / "store")
    return tmp_path / "store"


def test_rows_are_returned_in_order_and_bit_for_bit(folder: Path) -> None:
    store, rows = Store(folder, content()), CountingRows().all_rows
    assert store.shape == rows.shape == (22, 2, 3) and len(store) == 22
    for wanted in ([21, 0, 7, 8, 8, 15, 3], [5], list(range(22)), []):
        assert torch.equal(store[wanted], rows[wanted])
    for where in (slice(6, 10), slice(16, 99), slice(None), slice(-3, None)):
        assert torch.equal(store[where], rows[where])
    with pytest.raises(IndexError):
        store[[22]]


def test_batches_never_span_two_shards(tmp_path: Path) -> None:
    assert fill_store(tmp_path).batches == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 22)]


def test_a_shard_is_a_readable_safetensors_file(folder: Path) -> None:
    tensors = load_file(folder / "00001.safetensors")
    assert torch.equal(tensors["rows"], CountingRows().all_rows[8:16]) and tensors["digests"].shape == (8, 32)
    with safe_open(folder / "00001.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"key", "digest"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 2, 2), (5,), (0,)])
def test_rows_of_several_shapes_and_dtypes(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = fill_store(tmp_path, shape=shape, dtype=dtype)
    store = Store(tmp_path, content())
    assert store.row_format == RowFormat(shape, str(dtype).removeprefix("torch."))
    assert torch.equal(store[[20, 1]], made.all_rows[[20, 1]])
    assert fill_store(tmp_path, shape=shape, dtype=dtype).batches == []
    for number in range(3):
        assert (tmp_path / f"{number:05}.safetensors").stat().st_size == shard_file.file_size(
            store.row_format, content().rows(number)
        )


def test_the_same_content_gives_the_same_bytes_in_any_folder(folder: Path, tmp_path: Path) -> None:
    fill_store(tmp_path / "elsewhere/store")
    assert contents(folder) == contents(tmp_path / "elsewhere/store")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert fill_store(folder).batches == []
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def flip(where: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(path: Path) -> None:
    """Replace it by another shard, intact but with other rows."""
    path.write_bytes((path.parent / "00000.safetensors").read_bytes())


def reshape(path: Path) -> None:
    """The same bytes and key as rows of another shape; every digest in the file is right."""
    rows = load_file(path)["rows"].reshape(-1, 3, 2)
    write(path, rows, content().key(1))


def retype(path: Path) -> None:
    write(path, load_file(path)["rows"].half(), content().key(1))


def other_rows(path: Path) -> None:
    """Intact and with the right key, but with another digest than the index's."""
    write(path, load_file(path)["rows"] + 1, content().key(1))


def splice(path: Path) -> None:
    """Other rows with their digests, under the original header."""
    whole = path.read_bytes()
    other_rows(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:start] + path.read_bytes()[start:])


def write(path: Path, rows: Tensor, key: str) -> None:
    _, head, body = shard_file.encode(rows, key)
    path.write_bytes(head + bytes(body))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a folder": become_a_folder,
    "empty": empty,
    "truncated": truncate,
    "lengthened": lengthen,
    "no header": overwrite,
    "another shard": swap,
    "another shape": reshape,
    "another type": retype,
    "other rows under its header": splice,
    **{f"a bit flipped at {where}": flip(where) for where in (0, 0.02, 0.15, 0.3, 0.35, 0.5, 0.7, 0.85, 1)},
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_never_used_and_only_it_is_recomputed(folder: Path, how: str) -> None:
    before, path = contents(folder), folder / "00001.safetensors"
    opened = Store(folder, content())
    assert torch.equal(opened[[9]], CountingRows().all_rows[[9]])
    DAMAGE[how](path)
    with pytest.raises(StoreError, match=r"00001\.safetensors is damaged: .*`textcraftor prepare`"):
        Store(folder, content())[8:16]
    with pytest.raises(StoreError, match=r"00001\.safetensors is damaged"):
        opened[8:16]  # though it was proven before
    again = CountingRows()
    assert fill(folder, content(), again, BATCH, RowFormat((2, 3))) == 1
    assert again.shards == {1} and contents(folder) == before
    assert torch.equal(opened[8:16], CountingRows().all_rows[8:16]), "an open store goes on with the new shard"


def test_a_flipped_bit_in_any_byte_is_found(tmp_path: Path) -> None:
    table = TABLE.head(2)
    made = CountingRows(table, (2,))
    one = StoreContent(FACTS, table, 2)
    fill(tmp_path, one, made, 2)
    path, rows = tmp_path / "00000.safetensors", made.all_rows
    whole = path.read_bytes()
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1 << byte % 8)]) + whole[byte + 1 :])
        with pytest.raises(shard_file.DamagedShard):
            shard_file.verify(path, one.key(0), 2)
        with pytest.raises(StoreError):
            Store(tmp_path, one)[[0, 1]]
    path.write_bytes(whole)
    assert torch.equal(Store(tmp_path, one)[[0, 1]], rows)


def test_only_reading_the_damaged_row_fails(folder: Path) -> None:
    """A batch verifies the rows it reads and reads no others."""
    path = folder / "00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    store = Store(folder, content())
    assert torch.equal(store[[16, 20]], CountingRows().all_rows[[16, 20]])
    with pytest.raises(StoreError, match="row 5 of it is not the one that was written"):
        store[[16, 21]]


def test_an_intact_shard_with_another_digest_than_the_indexs_is_not_used(folder: Path) -> None:
    other_rows(folder / "00001.safetensors")
    with pytest.raises(StoreError, match="not the one that was written"):
        Store(folder, content())[[8]]


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, "does not exist, or is not finished"),
        ("", "is damaged"),
        ("[1]", "is damaged"),
        ('{"mode": "inline"}', "is damaged, or is not the index of a store"),
    ],
)
def test_a_store_without_its_index_is_not_used_and_keeps_its_shards(folder: Path, index: str | None, says: str) -> None:
    before = contents(folder)
    (folder / "index.json").unlink() if index is None else (folder / "index.json").write_text(index)
    with pytest.raises(StoreError, match=says):
        Store(folder, content())
    assert fill_store(folder).batches == [] and contents(folder) == before


@pytest.mark.parametrize(
    "facts",
    [{**FACTS, "base": "b" * 64}, {**FACTS, "switch": 19}, {**FACTS, "chain": {**FACTS["chain"], "guidance_scale": 7.0}}],  # type: ignore[dict-item]
)
def test_other_facts_make_every_shard_stale(folder: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="belongs to other prompts, base or settings"):
        Store(folder, content(facts))
    made = CountingRows()
    assert fill(folder, content(facts), made, BATCH) == 3 and made.shards == {0, 1, 2}


@pytest.mark.parametrize(
    ("table", "stale"),
    [
        (pl.concat([TABLE, TABLE.head(3)]), {2, 3}),  # the last shard was not full
        (pl.concat([TABLE.head(16), TABLE.head(8), TABLE.tail(6)]), {2, 3}),
        (TABLE.head(16), set()),
        (TABLE.head(12), {1}),
        (TABLE.with_columns(pl.col("prompt").replace("prompt 9", "another")), {1}),
        (TABLE.with_columns(pl.col("seed").replace(3, 99)), {0}),
        (TABLE.reverse(), {0, 1, 2}),
    ],
)
def test_other_prompts_or_seeds_make_only_their_own_shards_stale(
    folder: Path, tmp_path: Path, table: pl.DataFrame, stale: set[int]
) -> None:
    with pytest.raises(StoreError, match="belongs to other prompts, base or settings"):
        Store(folder, content(table=table))
    made = CountingRows(table)
    assert fill(folder, content(table=table), made, BATCH) == len(stale)
    assert made.shards == stale
    fill_store(tmp_path / "fresh", table=table)
    assert contents(folder) == contents(tmp_path / "fresh"), "the same as a store filled at once"


def test_an_interrupted_fill_continues_with_the_next_shard(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    made = CountingRows()

    def dies_in_the_third_shard(rows: slice) -> Tensor:
        if rows.start == 20:
            raise Killed
        return made(rows)

    with pytest.raises(Killed):
        fill(tmp_path, content(), dies_in_the_third_shard, BATCH)
    with pytest.raises(StoreError, match="not finished"):
        Store(tmp_path, content())
    (tmp_path / ".00002.safetensors.x1").mkdir()  # what SIGKILL leaves
    (tmp_path / ".00002.safetensors.x1/00002.safetensors").write_bytes(b"half")
    resumed = fill_store(tmp_path)
    assert resumed.batches == [(16, 20), (20, 22)]
    assert contents(tmp_path).keys() == {"index.json", *(f"0000{number}.safetensors" for number in range(3))}


def test_a_shard_is_replaced_and_never_written_in_place(folder: Path, tmp_path: Path) -> None:
    """DVC may hard-link its cache to a shard: the linked file must not change."""
    linked = tmp_path / "cache"
    os.link(folder / "00000.safetensors", linked)
    before = linked.read_bytes()
    fill(folder, content({**FACTS, "switch": 1}), CountingRows(), BATCH)
    assert linked.read_bytes() == before != (folder / "00000.safetensors").read_bytes()
    store = Store(folder, content({**FACTS, "switch": 1}))
    store[:8].zero_()
    assert torch.equal(store[:8], CountingRows().all_rows[:8]), "a batch is a copy"


def test_a_nonfinite_row_is_an_error_that_names_its_prompt(tmp_path: Path) -> None:
    def broken(rows: slice) -> Tensor:
        made = CountingRows()(rows)
        made[(9 - rows.start,) if rows.start <= 9 < rows.stop else slice(0)] = float("nan")
        return made

    with pytest.raises(StoreError, match="'prompt 9' is not finite"):
        fill(tmp_path, content(), broken, BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]


def test_a_full_disk_is_one_line_and_keeps_existing_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("textcraftor.cache.store.written_aside", full)
    with pytest.raises(StoreError, match=r"00000\.safetensors: no space is left on the disk"):
        fill(folder, content({**FACTS, "switch": 1}), CountingRows(), BATCH)
    assert contents(folder) == before


def test_processes_divide_the_work_and_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    shared, part = tmp_path / "shared", tmp_path / "part"
    fill_store(part)
    (part / "00001.safetensors").unlink()

    def work() -> None:
        made = CountingRows()
        assert fill(shared, content(), made, BATCH) == 3
        assert made.shards == ({0, 2} if data_parallel.rank() == 0 else {1})
        again = CountingRows()
        assert fill(part, content(), again, BATCH) == 1
        # What is missing is dealt out anew, wherever it lies: shard 1 falls to the first.
        assert again.shards == ({1} if data_parallel.rank() == 0 else set())
        Store(shared, content())[:]

    in_processes(2, work)
    assert contents(shared) == contents(part) == contents(folder)


def test_reading_a_batch_takes_the_memory_of_a_batch(tmp_path: Path) -> None:
    """A process that reads a store of 128 MB in batches grows by a fraction of it."""
    rows, shape = 2048, (16, 32, 32)
    table = pl.DataFrame({"prompt": [str(row) for row in range(rows)], "seed": range(rows)})
    large = StoreContent(FACTS, table, 256)
    fill(tmp_path, large, lambda where: torch.zeros(where.stop - where.start, *shape), 256)
    script = (
        "import resource, sys; from pathlib import Path; import polars as pl; import torch\n"
        "from textcraftor.cache.store import StoreContent, Store\n"
        f"table = pl.DataFrame({{'prompt': [str(row) for row in range({rows})], 'seed': range({rows})}})\n"
        f"store = Store(Path(sys.argv[1]), StoreContent({FACTS!r}, table, 256))\n"
        "store[[0]]; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"for start in range(0, {rows}, 16): store[start:start + 16]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown.stdout) * unit < 16e6
