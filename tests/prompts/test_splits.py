import random

import polars as pl
import pytest

from textcraftor.prompts.splits import Split, is_held_out, split
from textcraftor.prompts.table import prompt_id


def rows(count: int, start: int = 0) -> pl.DataFrame:
    numbers = range(start, start + count)
    return pl.DataFrame(
        {
            "prompt_id": [prompt_id(f"prompt {i}") for i in numbers],
            "category": ["rare" if i % 10 == 0 else "common" for i in numbers],
            "source": [f"source {i % 3}" for i in numbers],
        }
    )


def ids(table: pl.DataFrame) -> set[str]:
    return set(table["prompt_id"])


def parts(table: pl.DataFrame, heldout: int = 100, max_train: int | None = None, seed: int = 0) -> Split:
    return split(table, heldout, 0.2, max_train, seed)


def test_every_row_lands_in_exactly_one_part() -> None:
    one = parts(rows(1000), heldout=100, max_train=600)
    tables = (one.heldout, one.reserve, one.train, one.surplus)
    assert (one.heldout.height, one.train.height) == (100, 600)
    assert sum(table.height for table in tables) == 1000
    assert set.union(*map(ids, tables)) == ids(rows(1000))
    assert one.train.columns == ["prompt_id", "category", "source"]


def test_each_category_is_evaluated_on_by_its_share() -> None:
    held = parts(rows(1000)).heldout
    assert dict(held["category"].value_counts().iter_rows()) == {"rare": 10, "common": 90}


def test_a_category_without_enough_held_out_prompts_leaves_its_places_to_the_others() -> None:
    one = parts(rows(1000), heldout=190)
    assert one.heldout.height == 190 and one.reserve.height == is_held_out(rows(1000)["prompt_id"], 0.2, 0).sum() - 190


def test_the_share_holds_and_the_seed_changes_the_choice() -> None:
    table = rows(20_000)["prompt_id"]
    first, second = is_held_out(table, 0.2, 0), is_held_out(table, 0.2, 1)
    assert first.mean() == pytest.approx(0.2, abs=0.01)
    assert (first & second).mean() == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize("count", [5, 40, 300, 2000])
def test_train_and_held_out_prompts_never_swap(count: int) -> None:
    """Under growth, removal, reordering and other quotas, a prompt trained on once is never evaluated on, nor the reverse."""
    rng = random.Random(count)
    table = rows(count)
    trained: set[str] = set()
    evaluated: set[str] = set()
    for _ in range(12):
        grown = rows(rng.randrange(2 * count), start=count) if rng.random() < 0.7 else table.clear()
        changed = pl.concat([table, grown]).sample(fraction=rng.uniform(0.3, 1), shuffle=True, seed=rng.randrange(99))
        if rng.random() < 0.3:  # a source is removed
            changed = changed.filter(pl.col("source") != "source 1")
        one = parts(changed, heldout=rng.randrange(1, count), max_train=rng.choice([None, 1, count]))
        trained |= ids(one.train)
        evaluated |= ids(one.heldout)
    assert trained and not trained & evaluated


def test_the_order_of_rows_does_not_matter() -> None:
    one, other = parts(rows(1000)), parts(rows(1000).reverse())
    assert one.heldout.equals(other.heldout) and one.train.equals(other.train)
