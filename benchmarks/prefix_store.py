"""Compares random batches from the prefix store with the same rows of one tensor in memory: time, memory, verification.

    python -m benchmarks.prefix_store [--rows 200000] [--channels 4] [--size 16] [--batch 64] [--batches 500] [--folder DIR]

Each variant runs in its own process. The store's pages are in the page cache, as after `prepare`; a cold disk adds its read
time. 4 x 64 x 64 is SD 1.5 at 512 px: 64 KB per row in float32.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from textcraftor.cache import shard_file
from textcraftor.cache.shard_file import RowFormat
from textcraftor.cache.store import Store, StoreContent, bytes_on_disk, fill

SHARD = 1024


def content(rows: int) -> StoreContent:
    """As of `prepare`: a prompt and a seed for each row."""
    return StoreContent(
        {"benchmark": rows}, pl.DataFrame({"prompt": [f"a prompt, number {row}" for row in range(rows)]}), SHARD
    )


def memory() -> float:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(way: str, folder: Path, rows: int, batch: int, batches: int) -> dict[str, float]:
    """Seconds to open and per batch, and the growth of peak memory in bytes.  way: "tensor" or "store"."""
    wanted, before, started = content(rows), memory(), time.perf_counter()
    source: Store | torch.Tensor = Store(folder, wanted)
    if way == "tensor":
        source = source[:]  # one tensor, as a cache in one file would be loaded
    opened = time.perf_counter()
    order = np.random.default_rng(0).permutation(rows)
    total = 0.0
    for number in range(batches):
        where = [int(order[place % rows]) for place in range(number * batch, (number + 1) * batch)]
        total += float(source[where].flatten()[0])
    seconds = (time.perf_counter() - opened) / batches
    return {"open": opened - started, "batch": seconds, "memory": memory() - before, "peak": memory(), "check": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 200_000, "channels": 4, "size": 16, "batch": 64, "batches": 500}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measure(asked.way, asked.folder, asked.rows, asked.batch, asked.batches)))
        return
    row_format = RowFormat((asked.channels, asked.size, asked.size))
    with tempfile.TemporaryDirectory() as scratch:
        folder, generator = (asked.folder or Path(scratch)) / "store", torch.Generator().manual_seed(0)
        started = time.perf_counter()
        fill(
            folder,
            content(asked.rows),
            lambda rows: torch.randn(rows.stop - rows.start, *row_format.shape, generator=generator),
            SHARD,
        )
        written, size = time.perf_counter() - started, bytes_on_disk(folder)
        whole, started = content(asked.rows), time.perf_counter()
        numbers = whole.shards[:20]
        for number in numbers:
            shard_file.verify(folder / f"{number:05}.safetensors", whole.key(number), whole.rows(number))
        proven = sum(shard_file.file_size(row_format, whole.rows(number)) for number in numbers) / (
            time.perf_counter() - started
        )
        command = [sys.executable, "-m", "benchmarks.prefix_store", "--folder", str(folder)]
        command += [f"--{name}={getattr(asked, name)}" for name in ("rows", "batch", "batches")]
        found = {
            way: json.loads(subprocess.run([*command, "--way", way], capture_output=True, text=True, check=True).stdout)
            for way in ("tensor", "store")
        }
    one, ours = found["tensor"], found["store"]
    if one["check"] != ours["check"]:
        raise SystemExit("the store and the tensor differ")
    print(f"{asked.rows:,} rows of {row_format.bytes / 1e3:.1f} KB, {size / 1e9:.2f} GB, {len(whole.shards)} shards")
    print(f"written in {written:.1f} s; `prepare` proves {proven / 1e6:,.0f} MB a second; batches of {asked.batch}:")
    for name, row in (("one tensor", one), ("store", ours)):
        times = f"opened in {row['open']:6.2f} s   a batch {row['batch'] * 1e3:7.2f} ms"
        print(f"{name:10}  {times}   peak memory {row['peak'] / 1e6:8.1f} MB, {row['memory'] / 1e6:.1f} of it by reading")
    row_seconds = (ours["batch"] - one["batch"]) / asked.batch
    print(f"peak memory, libraries included: store / tensor = {ours['peak'] / one['peak']:.2f}")
    print(
        f"a batch: store / tensor = {ours['batch'] / one['batch']:.1f}, that is {row_seconds * 1e6:.0f} microseconds more a row"
    )


if __name__ == "__main__":
    main()
