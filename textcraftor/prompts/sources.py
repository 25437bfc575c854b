"""Reading of prompt sources: generated prompts of the tiny world, or a file in one of six formats.

Nothing is dropped: a row without a prompt is None, so that curation can count it. An unreadable file raises PromptError.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import polars as pl
from polars.exceptions import PolarsError

from textcraftor.config import FileSource, PromptSource, SceneSource
from textcraftor.errors import PromptError
from textcraftor.tiny.language import sample_prompts

DEFAULT_COLUMN: Final = FileSource.model_fields["column"].default
FALLBACK_COLUMNS: Final = ("text", "caption", "prompt")

Rows = list[str | None]


def source_name(source: PromptSource) -> str:
    """The name of a source in counts and tables: its path as configured, or the scenes' seed."""
    return f"scenes/{source.seed}" if isinstance(source, SceneSource) else source.path


def read_source(source: PromptSource, root: Path) -> Rows:
    """Every row of a source in its own order; None for a row without a prompt.

    root: the folder that a relative path starts from.
    Raises PromptError when the file is missing, empty, not UTF-8, malformed, or lacks the column.
    """
    if isinstance(source, SceneSource):
        return list(sample_prompts(source.count, source.seed, source.rich_fraction, source.pair_fraction, source.omit))
    if source.origin and not (root / source.path).exists():
        raise PromptError(f"{root / source.path} does not exist. {source.origin}")
    return read_file(root / source.path, source.column)


def read_file(path: Path, column: str = DEFAULT_COLUMN) -> Rows:
    """The prompts of one file, whose suffix names its format. Raises PromptError, see `read_source`."""
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise PromptError(
            f"{path} has the suffix {path.suffix or '(none)'!r}. "
            f"Prompts are read from {', '.join(FORMATS)}: convert or rename it"
        )
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise PromptError(f"{path} {what}. Correct the path of this prompt source; a relative one starts at the project's root")
    try:
        if path.suffix.lower() != ".parquet":
            _require_text(path)
        return read(path, column)
    except PolarsError as error:
        hint = '. Put a prompt that holds a comma in "quotation marks"' if path.suffix.lower() == ".csv" else ""
        raise PromptError(f"{path} is not a well-formed {path.suffix[1:]} file: {_first_line(error)}{hint}") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror or error}") from None


def _require_text(path: Path) -> None:
    """Raise PromptError for a file that is empty or not UTF-8, with the position of the first wrong byte."""
    offset, blank = 0, True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = f"byte 0x{line[error.start]:02x} at offset {offset + error.start} (line {number})"
                raise PromptError(
                    f"{path} is not UTF-8: {at}. Save it as UTF-8, for example with: iconv -f latin1 -t utf-8"
                ) from None
            offset += len(line)
            blank = blank and not text.strip()
    if blank:
        raise PromptError(f"{path} is empty. Give a file with at least one prompt")


def _read_txt(path: Path, column: str) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        return [line if line.strip() else None for line in file]


def _read_csv(path: Path, column: str) -> Rows:
    return _read_table(path, column, separator=",", quote='"')


def _read_tsv(path: Path, column: str) -> Rows:
    # TSV prompt sets are unquoted: a quotation mark is part of the prompt (PartiPrompts).
    return _read_table(path, column, separator="\t", quote=None)


def _read_table(path: Path, column: str, separator: str, quote: str | None) -> Rows:
    # Read all columns: only then is a row with too many fields an error, and not a prompt cut at its comma.
    table = pl.read_csv(path, separator=separator, quote_char=quote, infer_schema=False)
    return table[_find_column(path, column, table.columns)].to_list()


def _read_parquet(path: Path, column: str) -> Rows:
    schema = pl.read_parquet_schema(path)
    name = _find_column(path, column, list(schema))
    if schema[name] not in (pl.String, pl.Categorical, pl.Null):
        raise PromptError(f"{path}: column {name!r} holds {schema[name]}, not text. Name another with `column`")
    return pl.read_parquet(path, columns=[name])[name].cast(pl.String).to_list()


def _read_json(path: Path, column: str) -> Rows:
    data = _parse(path, path.read_text(encoding="utf-8-sig"), "")
    if not isinstance(data, list):
        raise PromptError(f"{path} must hold a list of strings or of objects, got {type(data).__name__}")
    return _from_items(path, column, ((f"item {index}", item) for index, item in enumerate(data)))


def _read_jsonl(path: Path, column: str) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        return _from_items(path, column, ((where, _parse(path, line, where)) for where, line in lines))


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(f"{path} is not well-formed JSON{where and f' in {where}'}: {error}") from None


def _from_items(path: Path, column: str, items: Iterator[tuple[str, Any]]) -> Rows:
    """Prompts of a list of strings or objects; the first object decides which key holds the prompt."""
    rows: Rows = []
    key: str | None = None
    for where, item in items:
        if isinstance(item, dict):
            key = key if key is not None else _find_column(path, column, list(item))
            item = item.get(key)
        if item is not None and not isinstance(item, str):
            raise PromptError(f"{path}, {where}: a prompt must be text, got {type(item).__name__}")
        rows.append(item)
    return rows


def _find_column(path: Path, requested: str, names: list[str]) -> str:
    """The column named `requested`, ignoring case; for the default name, also the other usual names."""
    candidates = [requested, *FALLBACK_COLUMNS] if requested == DEFAULT_COLUMN else [requested]
    for candidate in candidates:
        matches = [name for name in names if name.strip().lower() == candidate.lower()]
        if matches:
            return candidate if candidate in matches else matches[0]
    tried = " or ".join(map(repr, dict.fromkeys(candidates)))
    raise PromptError(
        f"{path} has no column {tried}. It has: {', '.join(names) or 'none'}. Name the one that holds the prompt with `column`"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


FORMATS: Final[dict[str, Callable[[Path, str], Rows]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
