import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.expectations import validate
from textcraftor.config import Config, load
from textcraftor.errors import PromptError
from textcraftor.prompts import curate, noise_seed, prompt_id

REPOSITORY = Path(__file__).parents[2]
CURATED = Path("data/prompts/curated")
LONG = "a very detailed painting of a castle on a hill at night with many stars above it and a lake"
PROMPTS = [f"a {size} cat in {place} number {i}" for size in ("big", "old") for place in ("rain", "snow") for i in range(10)]


def config(**prompts: Any) -> Config:
    section = {
        "sources": [{"kind": "file", "path": "p.txt"}],
        "benchmarks": [{"kind": "file", "path": "bench.txt"}],
        "world": "any",
        "near_duplicate": 0.9,
        "blocklist": ["nude"],
        "heldout": 10,
        **prompts,
    }
    overrides = {"prompts": section, "evaluate": {"prompts": section["heldout"]}}
    return load(REPOSITORY / "params.yaml", overrides)


@pytest.fixture(scope="module")
def valid_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose curated prompts meet every expectation."""
    root = tmp_path_factory.mktemp("valid")
    (root / "p.txt").write_text("\n".join([*PROMPTS, LONG]))
    (root / "bench.txt").write_text("some benchmark prompt\n")
    curate(config().prompts, root, root / CURATED)
    return root


@pytest.fixture
def root(valid_workspace: Path, tmp_path: Path) -> Path:
    """A copy of the valid workspace that a test may change."""
    return shutil.copytree(valid_workspace, tmp_path / "workspace")


def edit(root: Path, table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    path = root / CURATED / f"{table}.parquet"
    change(pl.read_parquet(path)).write_parquet(path)


def row(prompt: str, source: str = "p.txt", category: str = "other", **wrong: Any) -> pl.DataFrame:
    """A table with one correct row for a prompt, except for the columns given."""
    name = prompt_id(prompt)
    right = {"prompt": prompt, "prompt_id": name, "seed": noise_seed(name, 0), "source": source, "category": category}
    return pl.DataFrame([{**right, "words": len(prompt.split()), **wrong}])


def record(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "data/prompts/validation.json").read_text(encoding="utf-8"))
    return found


def broken(root: Path) -> dict[str, list[str]]:
    """Run validation; each expectation that does not hold, with the values that break it."""
    with pytest.raises(PromptError, match=r"The curated prompts break \d+ of \d+ expectations: .*validation.html"):
        validate(config(), root)
    assert record(root)["success"] is False
    faults = [check for check in record(root)["checks"] if not check["holds"]]
    return {f"{check['table']}: {check['meaning']}": sorted(check["examples"]) for check in faults}


def test_valid_tables_pass_and_give_the_same_record_each_time(root: Path) -> None:
    validate(config(), root)
    files = [root / "data/prompts/validation.json", root / "data/prompts/validation.html"]
    once = [file.read_bytes() for file in files]
    told = record(root)
    assert told["success"] is True
    assert told["expectations"]["met"] == told["expectations"]["of"] >= 50
    assert {check["table"] for check in told["checks"]} == {"train", "heldout"}
    assert told["inputs"].keys() == {"train", "heldout"}
    validate(config(), root)
    assert [file.read_bytes() for file in files] == once
    assert str(root).encode() not in b"".join(once)
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_the_tiny_profile_passes_with_the_rules_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/expectations").symlink_to(REPOSITORY / "data/expectations")
    tiny = load(REPOSITORY / "params.yaml")
    curate(tiny.prompts, tmp_path, tmp_path / CURATED)
    validate(tiny, tmp_path)
    assert any("77 tokens" in check["meaning"] for check in record(tmp_path)["checks"])


def test_each_wrong_row_breaks_exactly_the_expected_expectations(root: Path) -> None:
    short, blocked, bell = row("ab"), row("a nude statue"), row("a bell\x07 rings")
    benchmark, like_benchmark = row("some benchmark prompt"), row("some, benchmark prompt!")
    category, source = row("of no category", category="fish"), row("of no source", source="else.txt")
    words, seed, negative = row("one word less", words=2), row("other noise", seed=7), row("negative noise", seed=-7)
    identity = row("another id", prompt_id="0" * 16, seed=noise_seed("0" * 16, 0))
    pattern = row("an odd id", prompt_id="XYZ", seed=noise_seed("XYZ", 0))
    leaked = pl.read_parquet(root / CURATED / "heldout.parquet").head(1)
    # A near duplicate of a held-out prompt: eighteen of its nineteen words.
    edit(root, "heldout", lambda heldout: pl.concat([heldout.filter(pl.col("prompt") != LONG).head(9), row(LONG)]))
    twin = row(LONG + " too")
    bounds = [short, blocked, bell, benchmark, like_benchmark, category, source]
    planted = pl.concat([*bounds, words, seed, negative, identity, pattern, leaked, twin])
    edit(root, "train", lambda train: pl.concat([train.filter(pl.col("prompt") != LONG), planted]))

    def prompts(*rows: pl.DataFrame) -> list[str]:
        return sorted(pl.concat(rows)["prompt"])

    assert broken(root) == {
        "train: prompts are as long as the bounds allow, in characters": ["ab"],
        "train: no prompt holds a blocked word": ["a nude statue"],
        "train: prompts are clean: no control characters, NFC": ["a bell\x07 rings instead of a bell rings"],
        "train: no benchmark prompt, nor a near duplicate of one, is in train": prompts(benchmark, like_benchmark),
        "train: every category is known": ["fish"],
        "train: every row comes from a source of this profile": ["else.txt"],
        "train: words counts the prompt's words": ["2 instead of 3"],
        "train: seeds follow from the prompt_id": sorted(
            f"{one['seed'].item()} instead of {noise_seed(one['prompt_id'].item(), 0)}" for one in (seed, negative)
        ),
        "train: seeds are not negative": ["-7"],
        "train: prompt_id is the digest of the prompt beside it": sorted(
            f"{one['prompt_id'].item()} instead of {prompt_id(one['prompt'].item())}" for one in (identity, pattern)
        ),
        "train: prompt_id is 16 hex digits": ["XYZ"],
        "train: no held-out prompt is in train": [leaked["prompt_id"].item()],
        "train: no near duplicate of a held-out prompt is in train": prompts(leaked, twin),
    }
    page = (root / "data/prompts/validation.html").read_text()
    assert leaked["prompt"].item() in page


def test_repeated_rows_are_reported_with_examples(root: Path) -> None:
    edit(root, "train", lambda train: pl.concat([train, train.head(1)]))
    twice = pl.read_parquet(root / CURATED / "train.parquet").head(1)
    assert broken(root) == {
        "train: no prompt occurs twice": [twice["prompt"].item()],
        "train: no prompt_id occurs twice": [twice["prompt_id"].item()],
        "train: no two prompts share their noise": [str(twice["seed"].item())],
    }


def test_tables_with_wrong_columns_or_types_fail(root: Path) -> None:
    edit(root, "train", lambda table: table.drop("source").with_columns(pl.col("seed").cast(pl.String), prompt=pl.lit(3)))
    edit(root, "heldout", lambda table: table.head(1).with_columns(prompt=pl.lit(None, pl.String)))
    assert broken(root).keys() >= {
        "train: every column is there",
        "train: seed holds whole numbers",
        "train: prompt holds text",
        "heldout: no prompt is missing",
        "heldout: as many rows as the prompts section allows",
    }


def test_an_unreadable_table_is_recorded_as_the_problem(root: Path) -> None:
    validate(config(), root)
    (root / CURATED / "heldout.parquet").write_text("not parquet")
    with pytest.raises(PromptError, match="not a readable parquet"):
        validate(config(), root)
    assert record(root)["success"] is False
    assert "heldout.parquet" in record(root)["problem"]
    assert "not fit" in (root / "data/prompts/validation.html").read_text()


def test_the_report_escapes_the_prompts_that_it_quotes(root: Path) -> None:
    edit(root, "train", lambda train: pl.concat([train, row("<script>alert(1)</script>", category="fish")]))
    broken(root)
    page = (root / "data/prompts/validation.html").read_text()
    assert "<script" not in page
    assert "http" not in page  # self-contained


def test_rules_of_the_project_are_checked(root: Path) -> None:
    rules = root / "data/expectations/mine.json"
    rules.parent.mkdir()
    rule = {
        "type": "expect_column_values_to_not_match_regex",
        "kwargs": {"column": "prompt", "regex": "castle"},
        "meaning": "no castles",
    }
    rules.write_text(json.dumps([rule]))
    table = "train" if LONG in set(pl.read_parquet(root / CURATED / "train.parquet")["prompt"]) else "heldout"
    assert broken(root) == {f"{table}: no castles": [LONG]}


@pytest.mark.parametrize(
    "text",
    ["[", "{}", '[{"type": "expect_nothing", "kwargs": {}, "meaning": "m"}]', '[{"type": "expect_column_to_exist"}]'],
)
def test_rules_unknown_to_great_expectations_are_refused(root: Path, text: str) -> None:
    rules = root / "data/expectations/mine.json"
    rules.parent.mkdir()
    rules.write_text(text)
    with pytest.raises(PromptError, match=r"mine.json is not a list of expectations"):
        validate(config(), root)
    assert record(root)["success"] is False
