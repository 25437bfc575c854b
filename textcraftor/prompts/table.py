"""The prompt table: its schema, the id and noise seed of a prompt, reading and writing.

A row is one prompt. `prompt_id` identifies it and `seed` seeds the noise of its first image. Both are functions of the
text alone, so a prompt gets the same noise in every run, batch and shard.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import polars as pl
from polars.exceptions import PolarsError

from textcraftor.errors import PromptError
from textcraftor.prompts.text import normalise

SCHEMA: Final = pl.Schema(
    {
        "prompt": pl.String,
        "prompt_id": pl.String,
        "seed": pl.Int64,
        "source": pl.String,
        "category": pl.String,
        "words": pl.Int64,
    }
)
_REMEDY: Final = "Make it with `textcraftor curate`"


def prompt_id(prompt: str) -> str:
    """The id of a prompt: the first 16 hex digits of the sha256 of its normalised text.

    Prompts that differ only in case or spacing have the same id. At 10 M prompts the chance that any two
    others share an id is 3 in a million.
    """
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]


def noise_seed(prompt_id: str, image_index: int) -> int:
    """Seed of the initial noise of one image of a prompt; 63 bits, so that it fits an int64."""
    return int.from_bytes(hashlib.sha256(f"{prompt_id}:{image_index}".encode()).digest()[:8]) >> 1


def write_prompts(table: pl.DataFrame, path: Path) -> None:
    """Write the columns of the schema, sorted by prompt_id; the same rows give the same bytes."""
    table.select(SCHEMA.names()).sort("prompt_id").cast(SCHEMA).write_parquet(path, compression="zstd")


def read_table(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a parquet file: all columns, or those of `columns` that it has.

    Raises PromptError when it is missing or not a parquet file.
    """
    try:
        present = pl.read_parquet_schema(path)
        return pl.read_parquet(path, columns=None if columns is None else [name for name in columns if name in present])
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist. {_REMEDY}") from None
    except (PolarsError, OSError) as error:
        raise PromptError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}. {_REMEDY}") from None


def read_prompts(path: Path, columns: Sequence[str] = tuple(SCHEMA)) -> pl.DataFrame:
    """Read columns of a curated table. Of ten million rows, two columns take half of the memory of all.

    Raises PromptError when the file is missing, not a parquet file, or lacks one of the columns.
    """
    table = read_table(path, columns)
    wrong = [f"{name} {kind}" for name, kind in SCHEMA.items() if name in columns and table.schema.get(name) != kind]
    if wrong:
        has = ", ".join(f"{name} {kind}" for name, kind in table.schema.items()) or "no columns"
        raise PromptError(f"{path} is not a prompt table: it needs {', '.join(wrong)}; it has {has}. {_REMEDY}")
    return table.select(columns)
