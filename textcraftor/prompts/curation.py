"""Curation: read sources, clean, filter, deduplicate, classify and split. Every dropped row is counted with its reason."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from textcraftor.artifact import proof, write_json, written_aside
from textcraftor.config import FileSource, PromptsConfig
from textcraftor.errors import PromptError
from textcraftor.prompts.categories import classify
from textcraftor.prompts.duplicates import near_duplicates
from textcraftor.prompts.sources import read_file, read_source, source_name
from textcraftor.prompts.splits import FEWEST_HELDOUT, is_held_out, split
from textcraftor.prompts.table import noise_seed, prompt_id, write_prompts
from textcraftor.prompts.text import clean
from textcraftor.tiny.language import parse

# Reasons to drop a row, in the order in which they are tried; the first that applies is counted.
REASONS: Final = {
    "empty": "no text, or only spaces and control characters",
    "too_short": "fewer characters than prompts.min_characters",
    "too_long": "more characters than prompts.max_characters",
    "blocked": "contains a word of prompts.blocklist",
    "foreign": "prompts.world is tiny, and the prompt is not of its language",
    "repeated": "the same prompt as an earlier row, case and spacing aside",
    "benchmark": "a benchmark prompt, or a near duplicate of one",
    "near_duplicate": "a near duplicate of a row that is kept",
    "reserve": "held out, and beyond prompts.heldout: neither trained nor evaluated on",
    "surplus": "beyond prompts.max_train",
}


@dataclass(frozen=True, slots=True)
class SourceCount:
    """Row counts of one source: read = train + heldout + the sum of dropped."""

    licence: str
    read: int
    train: int
    heldout: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class CurationSummary:
    """What curation did, as written to curation.json. notes: remarks on the outcome, such as too few held-out prompts."""

    train: int
    heldout: int
    heldout_asked: int
    categories: dict[str, dict[str, int]]
    sources: dict[str, SourceCount]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The numbers in one line, and each note in another."""
        read = sum(source.read for source in self.sources.values())
        dropped: dict[str, int] = {}
        for source in self.sources.values():
            for reason, count in source.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items() if count)
        line = f"{read:,} prompts read: {self.train:,} to train on, {self.heldout:,} held out"
        return "\n".join([line + (f"; dropped: {counts}" if counts else ""), *self.notes])


def curate(config: PromptsConfig, root: Path, out: Path) -> CurationSummary:
    """Write OUT/train.parquet, OUT/heldout.parquet and OUT/curation.json, atomically.

    root: the folder that relative paths of sources start from.  out: a folder, replaced as a whole.
    The same sources and config give the same bytes. The two tables contain no duplicates or near duplicates of each other,
    of themselves or of a benchmark prompt.
    Raises PromptError when a source cannot be read, or too few prompts are left to train and evaluate.
    """
    rows = _read(config, root)
    benchmarks = read_benchmarks(config, root)
    read = _per_source(rows)
    drops: dict[str, dict[str, int]] = {reason: {} for reason in REASONS}

    def drop(frame: pl.DataFrame, where: pl.Expr | pl.Series, reason: str) -> pl.DataFrame:
        marked = frame.with_columns(where.alias("dropped"))
        drops[reason] = _per_source(marked.filter("dropped"))
        return marked.filter(~pl.col("dropped")).drop("dropped")

    length = pl.col("prompt").str.len_chars()
    rows = drop(rows, pl.col("prompt") == "", "empty")
    rows = drop(rows, length < config.min_characters, "too_short")
    rows = drop(rows, length > config.max_characters, "too_long")
    rows = drop(rows, blocked(config.blocklist), "blocked")
    if config.world == "tiny":
        rows = drop(rows, pl.Series([parse(prompt) is None for prompt in rows["prompt"]], dtype=pl.Boolean), "foreign")
    rows = rows.with_columns(pl.Series("prompt_id", map(prompt_id, rows["prompt"]), dtype=pl.String))
    rows = drop(rows, ~pl.col("prompt_id").is_first_distinct(), "repeated")
    rows = drop(rows, resembles_any(rows["prompt"], benchmarks, config.near_duplicate), "benchmark")
    if not _held_out(config):
        # Of near duplicates the earlier row is kept. Train rows come first, so that no held-out prompt resembles one.
        held_out = is_held_out(rows["prompt_id"], config.heldout_share, config.seed)
        rows = pl.concat([rows.filter(~held_out), rows.filter(held_out)])
    rows = drop(rows, _repeats_earlier(rows["prompt"], config.near_duplicate), "near_duplicate")
    if rows.height < 2 * FEWEST_HELDOUT:
        raise PromptError(
            f"{rows.height or 'No'} prompts survive curation; {2 * FEWEST_HELDOUT} are the least to train on some "
            f"and evaluate on others. Dropped: {_describe_drops(drops)}. Add prompts.sources, or loosen what drops them"
        )

    rows = rows.with_columns(
        pl.Series("seed", [noise_seed(name, 0) for name in rows["prompt_id"]], dtype=pl.Int64),
        classify(rows["prompt"], config.world),
        pl.Series("words", [len(prompt.split()) for prompt in rows["prompt"]], dtype=pl.Int64),
    )
    tables = split(rows, config.heldout, config.heldout_share, config.max_train, config.seed, _held_out(config))
    if tables.heldout.height < FEWEST_HELDOUT or tables.train.is_empty():
        remedy = "Give sources with held_out: true and others without" if _held_out(config) else "Add prompts"
        raise PromptError(
            f"{tables.train.height} prompts are left to train on and {tables.heldout.height} to evaluate on; one and "
            f"{FEWEST_HELDOUT} are the least. Dropped: {_describe_drops(drops)}. {remedy}"
        )
    drops["reserve"] = _per_source(tables.reserve)
    drops["surplus"] = _per_source(tables.surplus)

    summary = _summary(config, tables.train, tables.heldout, read, drops)
    with written_aside(out) as aside:
        aside.mkdir()
        write_prompts(tables.train, aside / "train.parquet")
        write_prompts(tables.heldout, aside / "heldout.parquet")
        write_json(aside / "curation.json", _record(summary, config, root))
    return summary


def _held_out(config: PromptsConfig) -> list[str]:
    """Names of the sources marked held_out: evaluated on, never trained on."""
    return [source_name(source) for source in config.sources if isinstance(source, FileSource) and source.held_out]


def read_benchmarks(config: PromptsConfig, root: Path) -> pl.Series:
    """All prompts of `prompts.benchmarks`, cleaned."""
    texts = [text for source in config.benchmarks for text in read_file(root / source.path, source.column)]
    return pl.Series("prompt", [clean(text) for text in texts if text], dtype=pl.String)


def resembles_any(prompts: pl.Series, others: pl.Series, threshold: float) -> pl.Series:
    """Mask of the prompts that equal one of `others` or, for a threshold below 1, are a near duplicate of one."""
    same = pl.Series(map(prompt_id, prompts), dtype=pl.String).is_in({prompt_id(other) for other in others})
    if threshold == 1 or others.is_empty():
        return same
    pairs = near_duplicates(pl.concat([others, prompts]), threshold)
    near = pairs.filter(pl.col("row") >= len(others), pl.col("earlier") < len(others))["row"].unique()
    return same | pl.int_range(len(others), len(others) + len(prompts), eager=True).is_in(near.implode())


def _read(config: PromptsConfig, root: Path) -> pl.DataFrame:
    """All rows of all sources, cleaned. Of duplicates the first is kept, so sources marked held_out come first."""
    frames = []
    held_out = _held_out(config)
    for source in sorted(config.sources, key=lambda source: source_name(source) not in held_out):
        texts = [clean(text or "") for text in read_source(source, root)]
        frames.append(
            pl.DataFrame({"prompt": pl.Series(texts, dtype=pl.String)}).with_columns(source=pl.lit(source_name(source)))
        )
    return pl.concat(frames)


def blocked(blocklist: Iterable[str]) -> pl.Expr:
    """Whether a prompt contains one of these words, case aside."""
    words = [pl.escape_regex(clean(word).lower()) for word in blocklist if clean(word)]
    if not words:
        return pl.lit(False)
    # Not \b: a blocked word may begin or end with a character that is not a word character, as in "c++".
    return pl.col("prompt").str.to_lowercase().str.contains(rf"(?:^|\W)(?:{'|'.join(words)})(?:\W|$)")


def _repeats_earlier(prompts: pl.Series, threshold: float) -> pl.Series:
    """Mask of the rows that are near duplicates of an earlier row that is kept; none for a threshold of 1."""
    dropped: set[int] = set()
    if threshold < 1:
        for row, earlier in near_duplicates(prompts, threshold).select("row", "earlier").iter_rows():
            if earlier not in dropped:
                dropped.add(row)
    return pl.int_range(len(prompts), eager=True).is_in(sorted(dropped))


def _per_source(rows: pl.DataFrame) -> dict[str, int]:
    return dict(rows["source"].value_counts().iter_rows())


def _per_category(rows: pl.DataFrame) -> dict[str, int]:
    return dict(rows["category"].value_counts().sort("category").iter_rows())


def _describe_drops(drops: Mapping[str, Mapping[str, int]]) -> str:
    totals = {reason: sum(counts.values()) for reason, counts in drops.items()}
    return ", ".join(f"{reason} {total}" for reason, total in totals.items() if total) or "nothing, the sources have no rows"


def _summary(
    config: PromptsConfig,
    train: pl.DataFrame,
    heldout: pl.DataFrame,
    read: Mapping[str, int],
    drops: Mapping[str, Mapping[str, int]],
) -> CurationSummary:
    in_train, in_heldout = _per_source(train), _per_source(heldout)
    sources = {
        (name := source_name(source)): SourceCount(
            licence=source.licence if isinstance(source, FileSource) else "Apache-2.0",
            read=read.get(name, 0),
            train=in_train.get(name, 0),
            heldout=in_heldout.get(name, 0),
            dropped={reason: counts.get(name, 0) for reason, counts in drops.items()},
        )
        for source in config.sources
    }
    notes = []
    if heldout.height < config.heldout and _held_out(config):
        notes.append(f"prompts.heldout asks for {config.heldout}; the sources marked held_out gave {heldout.height}")
    elif heldout.height < config.heldout:
        notes.append(
            f"prompts.heldout asks for {config.heldout}; prompts.heldout_share = {config.heldout_share} of "
            f"{train.height + heldout.height} prompts gave {heldout.height}: evaluation runs on those"
        )
    return CurationSummary(
        train=train.height,
        heldout=heldout.height,
        heldout_asked=config.heldout,
        categories={"train": _per_category(train), "heldout": _per_category(heldout)},
        sources=sources,
        notes=tuple(notes),
    )


def _record(summary: CurationSummary, config: PromptsConfig, root: Path) -> dict[str, Any]:
    files = [source.path for source in (*config.sources, *config.benchmarks) if isinstance(source, FileSource)]
    inputs = {path: root / path for path in files}
    return {**asdict(summary), "reasons": REASONS, "proof": proof({"prompts": config}, inputs, config.seed)}
