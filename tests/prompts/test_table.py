from pathlib import Path

import polars as pl
import pytest

from textcraftor.errors import PromptError
from textcraftor.prompts.table import SCHEMA, noise_seed, prompt_id, read_prompts, write_prompts


def table(prompts: list[str]) -> pl.DataFrame:
    ids = [prompt_id(prompt) for prompt in prompts]
    return pl.DataFrame(
        {
            "prompt": prompts,
            "prompt_id": ids,
            "seed": [noise_seed(one, 0) for one in ids],
            "source": "s",
            "category": "other",
            "words": [len(prompt.split()) for prompt in prompts],
        }
    )


def test_the_id_depends_on_the_normalised_text() -> None:
    assert prompt_id("A red  circle ") == prompt_id("a red circle")
    assert prompt_id("a red circle") != prompt_id("a red circles")
    # Written down once: seeds of past runs, cached latents and scores all hang on it.
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"
    assert noise_seed("a1e4a280d27cad5b", 0) == 2062015334399992514


def test_seeds_fit_int64_and_differ_by_prompt_and_image() -> None:
    seeds = {noise_seed(prompt_id(f"prompt {i}"), image) for i in range(500) for image in range(4)}
    assert len(seeds) == 2000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62  # all 63 bits are used


def test_round_trip_gives_the_same_bytes_in_any_order_of_rows(tmp_path: Path) -> None:
    rows = table([f"prompt number {i}" for i in range(50)])
    write_prompts(rows, tmp_path / "a.parquet")
    write_prompts(rows.reverse().with_columns(extra=pl.lit(1)), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    back = read_prompts(tmp_path / "a.parquet")
    assert back.schema == SCHEMA
    assert back.equals(rows.sort("prompt_id"))


def test_a_file_that_is_not_a_prompt_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"does not exist.*textcraftor curate"):
        read_prompts(tmp_path / "none.parquet")
    (tmp_path / "rubbish.parquet").write_text("not parquet")
    with pytest.raises(PromptError, match="not a readable parquet"):
        read_prompts(tmp_path / "rubbish.parquet")
    table(["a"]).drop("seed").write_parquet(tmp_path / "less.parquet")
    with pytest.raises(PromptError, match=r"it needs seed Int64; it has prompt String"):
        read_prompts(tmp_path / "less.parquet")
