"""Checks of the curated prompts with Great Expectations, before anything is trained or evaluated on them.

They check on the files what curation guarantees, so that an edited, truncated or stale table stops the run. Rules of
your own go into `data/expectations/*.json`, see the README there.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tasks.validation_page import render_page
from textcraftor.artifact import digest, write_json, written_aside
from textcraftor.config import Config, PromptsConfig
from textcraftor.errors import PromptError
from textcraftor.layout import CURATED, EXPECTATIONS, VALIDATION, VALIDATION_PAGE
from textcraftor.prompts.categories import categories
from textcraftor.prompts.curation import blocked, read_benchmarks, resembles_any
from textcraftor.prompts.sources import source_name
from textcraftor.prompts.splits import FEWEST_HELDOUT
from textcraftor.prompts.table import SCHEMA, noise_seed, prompt_id, read_table
from textcraftor.prompts.text import clean
from textcraftor.tiny.language import parse

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.expectations import Expectation

EXAMPLES: Final = 5

Tables = dict[str, pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Check:
    """An expectation and its result. unexpected: number of rows that break it; examples: some of their values."""

    table: str
    meaning: str
    expectation: str
    column: str | None
    holds: bool
    observed: str | None
    unexpected: int
    examples: tuple[str, ...]


def validate(config: Config, root: Path) -> None:
    """Check both curated tables and write data/prompts/validation.json and validation.html.

    Raises PromptError, after writing both, when an expectation does not hold or a table cannot be read.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Great Expectations reads it when it is imported, below
    paths = {name: root / CURATED / f"{name}.parquet" for name in ("train", "heldout")}
    inputs = {name: digest(path) for name, path in paths.items() if path.is_file()}
    try:
        checks = _all_checks({name: read_table(path) for name, path in paths.items()}, config.prompts, root)
    except PromptError as error:
        _write(root, success=False, problem=str(error), inputs=inputs, checks=[])
        raise
    broken = [check for check in checks if not check.holds]
    _write(root, success=not broken, problem=None, inputs=inputs, checks=checks)
    if broken:
        described = "; ".join(_describe(check) for check in broken[:3]) + ("; ..." if len(broken) > 3 else "")
        raise PromptError(
            f"The curated prompts break {len(broken)} of {len(checks)} expectations: {described}. "
            f"Read {VALIDATION_PAGE}, mend the sources or the prompts section, and curate again"
        )


def _all_checks(tables: Tables, config: PromptsConfig, root: Path) -> list[Check]:
    checks = _check(tables, {name: _structure(name, config) for name in tables})
    if not all(check.holds for check in checks):
        return checks  # the other expectations need all columns
    extended = _with_evidence(tables, config, root)
    checks += _check(extended, {name: _content(name, extended, config) for name in tables})
    return checks + _check(tables, {name: _project_rules(name, root) for name in tables})


def _structure(name: str, config: PromptsConfig) -> list["Expectation"]:
    """Expectations of columns, types and size."""
    import great_expectations.expectations as gxe

    fewest, most = (1, config.max_train) if name == "train" else (FEWEST_HELDOUT, config.heldout)
    expected: list[Expectation] = [
        gxe.ExpectTableColumnsToMatchSet(column_set=SCHEMA.names(), exact_match=False, meta=_means("every column is there")),
        gxe.ExpectTableRowCountToBeBetween(
            min_value=fewest, max_value=most, meta=_means("as many rows as the prompts section allows")
        ),
    ]
    for column, kind in SCHEMA.items():
        type_name = "str" if kind == pl.String else "int64"
        meaning = _means(f"{column} holds {'text' if kind == pl.String else 'whole numbers'}")
        expected.append(gxe.ExpectColumnValuesToBeOfType(column=column, type_=type_name, meta=meaning))
        expected.append(gxe.ExpectColumnValuesToNotBeNull(column=column, meta=_means(f"no {column} is missing")))
    return expected


def _content(name: str, tables: Tables, config: PromptsConfig) -> list["Expectation"]:
    """Expectations of the rows. `_with_evidence` adds the columns that are not in the schema."""
    import great_expectations.expectations as gxe

    world = categories(config.world)
    expected: list[Expectation] = [
        gxe.ExpectColumnValuesToBeUnique(column="prompt", meta=_means("no prompt occurs twice")),
        gxe.ExpectColumnValuesToBeUnique(column="prompt_id", meta=_means("no prompt_id occurs twice")),
        gxe.ExpectColumnValuesToBeUnique(column="seed", meta=_means("no two prompts share their noise")),
        gxe.ExpectColumnValueLengthsToBeBetween(
            column="prompt",
            min_value=config.min_characters,
            max_value=config.max_characters,
            meta=_means("prompts are as long as the bounds allow, in characters"),
        ),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="prompt", column_B="cleaned", meta=_means("prompts are clean: no control characters, NFC")
        ),
        gxe.ExpectColumnValuesToMatchRegex(
            column="prompt_id", regex="^[0-9a-f]{16}$", meta=_means("prompt_id is 16 hex digits")
        ),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="prompt_id", column_B="own_id", meta=_means("prompt_id is the digest of the prompt beside it")
        ),
        gxe.ExpectColumnValuesToBeBetween(column="seed", min_value=0, meta=_means("seeds are not negative")),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="seed", column_B="own_seed", meta=_means("seeds follow from the prompt_id")
        ),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="words", column_B="own_words", meta=_means("words counts the prompt's words")
        ),
        gxe.ExpectColumnValuesToBeInSet(column="category", value_set=list(world), meta=_means("every category is known")),
        gxe.ExpectColumnValuesToBeInSet(
            column="source",
            value_set=sorted({source_name(source) for source in config.sources}),
            meta=_means("every row comes from a source of this profile"),
        ),
        gxe.ExpectColumnValuesToBeNull(column="blocked", meta=_means("no prompt holds a blocked word")),
    ]
    if config.world == "tiny":
        expected.append(gxe.ExpectColumnValuesToBeNull(column="foreign", meta=_means("every prompt is of the tiny world")))
    if name == "train":
        held = tables["heldout"]["prompt_id"].to_list()
        expected += [
            gxe.ExpectColumnValuesToNotBeInSet(
                column="prompt_id", value_set=held, meta=_means("no held-out prompt is in train")
            ),
            gxe.ExpectColumnValuesToBeNull(
                column="like_heldout", meta=_means("no near duplicate of a held-out prompt is in train")
            ),
            gxe.ExpectColumnValuesToBeNull(
                column="like_benchmark", meta=_means("no benchmark prompt, nor a near duplicate of one, is in train")
            ),
        ]
    return expected


def _with_evidence(tables: Tables, config: PromptsConfig, root: Path) -> Tables:
    """The tables with the recomputed value of each column (`cleaned`, `own_*`), and with a column for each rule.

    A rule's column holds the prompts that break it and null elsewhere, so that reports quote them.
    """
    benchmarks = read_benchmarks(config, root)
    heldout = tables["heldout"]["prompt"]
    extended = {}
    for name, table in tables.items():
        prompts = table["prompt"]
        rules = {
            "blocked": table.select(blocked(config.blocklist).alias("blocked"))["blocked"],
            "foreign": pl.Series([parse(prompt) is None for prompt in prompts], dtype=pl.Boolean),
        }
        if name == "train":
            rules["like_heldout"] = resembles_any(prompts, heldout, config.near_duplicate)
            rules["like_benchmark"] = resembles_any(prompts, benchmarks, config.near_duplicate)
        extended[name] = table.with_columns(
            pl.Series("cleaned", map(clean, prompts), dtype=pl.String),
            pl.Series("own_id", map(prompt_id, prompts), dtype=pl.String),
            pl.Series("own_seed", [noise_seed(one, 0) for one in table["prompt_id"]], dtype=pl.Int64),
            pl.Series("own_words", [len(prompt.split()) for prompt in prompts], dtype=pl.Int64),
            *(pl.when(breaks).then(pl.col("prompt")).alias(rule) for rule, breaks in rules.items()),
        )
    return extended


def _project_rules(name: str, root: Path) -> list["Expectation"]:
    """Expectations of data/expectations/*.json. Raises PromptError for one that Great Expectations does not know."""
    from great_expectations.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.registry import get_expectation_impl

    expected = []
    for path in sorted((root / EXPECTATIONS).glob("*.json")):
        try:
            rules = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rules, list):
                raise TypeError(f"got {type(rules).__name__}")
            for rule in rules:
                if name in rule.get("tables", ["train", "heldout"]):
                    expectation = get_expectation_impl(rule["type"])
                    expected.append(expectation(**rule["kwargs"], meta=_means(rule["meaning"])))
        except (ValueError, TypeError, KeyError, AttributeError, ExpectationNotFoundError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PromptError(
                f"{path} is not a list of expectations ({what}). "
                'Each is {"type": "expect_...", "kwargs": {...}, "meaning": "..."}'
            ) from None
    return expected


def _means(meaning: str) -> dict[str, str]:
    return {"meaning": meaning}


def _check(tables: Tables, expectations: dict[str, list["Expectation"]]) -> list[Check]:
    """Check each table with Great Expectations; the results are in the order of the expectations."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("curated")
    checks = []
    for name, table in tables.items():
        if not expectations[name]:
            continue
        definition = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("whole")
        batch = definition.get_batch({"dataframe": _to_pandas(table)})
        suite = gx.ExpectationSuite(name=name, expectations=expectations[name])
        form = {"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES}
        results = [result.to_json_dict() for result in batch.validate(suite, result_format=form).results]
        order = [each.meta["meaning"] for each in expectations[name] if each.meta]
        # Great Expectations returns them in another order.
        checks += sorted((_as_check(name, result) for result in results), key=lambda check: order.index(check.meaning))
    return checks


def _to_pandas(table: pl.DataFrame) -> "pd.DataFrame":
    """The table with text as Python strings, because otherwise Great Expectations does not check the type of each value."""
    text = [name for name, kind in table.schema.items() if kind == pl.String]
    return table.to_pandas().astype(dict.fromkeys(text, object))


def _as_check(table: str, result: dict[str, Any]) -> Check:
    expectation, found = result["expectation_config"], result["result"]
    kwargs = expectation["kwargs"]
    examples = [_format_value(value) for value in found.get("partial_unexpected_list", [])[:EXAMPLES]]
    observed = found.get("observed_value")
    if isinstance(observed, list):
        observed = ", ".join(map(str, observed))
    return Check(
        table=table,
        meaning=expectation["meta"]["meaning"],
        expectation=expectation["type"],
        column=kwargs.get("column") or " = ".join(kwargs[key] for key in ("column_A", "column_B") if key in kwargs) or None,
        holds=result["success"],
        observed=_exception_message(result["exception_info"]) or (None if observed is None else str(observed)),
        unexpected=found.get("unexpected_count", 0),
        examples=tuple(dict.fromkeys(examples)),
    )


def _format_value(value: Any) -> str:
    """An unexpected value; of a pair, the value found and the value expected."""
    return " instead of ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _exception_message(info: dict[str, Any]) -> str | None:
    """The exception that an expectation raised, None without one. info: one entry, or one for each metric."""
    entries = [info] if "raised_exception" in info else list(info.values())
    messages = [str(entry["exception_message"]) for entry in entries if entry["raised_exception"]]
    return "could not be evaluated: " + messages[0] if messages else None


def _describe(check: Check) -> str:
    rows = f" ({check.unexpected} rows, such as {check.examples[0][:80]!r})" if check.examples else ""
    observed = f" (it is {check.observed})" if check.observed and not rows else ""
    return f"{check.table}: {check.meaning}{rows}{observed}"


def _write(root: Path, success: bool, problem: str | None, inputs: dict[str, str], checks: Sequence[Check]) -> None:
    record = {
        "success": success,
        "problem": problem,
        "great_expectations": version("great_expectations"),
        "inputs": inputs,
        "expectations": {"met": sum(check.holds for check in checks), "of": len(checks)},
        "checks": [asdict(check) for check in checks],
    }
    write_json(root / VALIDATION, record)
    with written_aside(root / VALIDATION_PAGE) as aside:
        aside.write_text(render_page(record), encoding="utf-8")
