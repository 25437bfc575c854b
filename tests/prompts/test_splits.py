import polars as pl
import pytest

from textcraftor.prompts.splits import split
from textcraftor.prompts.table import prompt_id


def rows(count: int, start: int = 0) -> pl.DataFrame:
    numbers = range(start, start + count)
    return pl.DataFrame(
        {
            "prompt_id": [prompt_id(f"prompt {i}") for i in numbers],
            "category": ["rare" if i % 10 == 0 else "common" for i in numbers],
        }
    )


def ids(table: pl.DataFrame) -> set[str]:
    return set(table["prompt_id"])


def test_every_row_lands_in_exactly_one_part() -> None:
    parts = split(rows(1000), heldout=100, max_train=600, seed=0)
    assert (parts.heldout.height, parts.train.height, parts.surplus.height) == (100, 600, 300)
    assert ids(parts.heldout) | ids(parts.train) | ids(parts.surplus) == ids(rows(1000))
    assert parts.train.columns == ["prompt_id", "category"]


def test_each_category_is_held_out_by_its_share() -> None:
    held = split(rows(1000), heldout=100, max_train=None, seed=0).heldout
    assert dict(held["category"].value_counts().iter_rows()) == {"rare": 10, "common": 90}


def test_order_of_rows_does_not_matter_and_the_seed_does() -> None:
    held = ids(split(rows(1000), 100, None, seed=0).heldout)
    assert ids(split(rows(1000).reverse(), 100, None, seed=0).heldout) == held
    assert len(ids(split(rows(1000), 100, None, seed=1).heldout) & held) < 30


def test_new_prompts_do_not_reshuffle_old_ones() -> None:
    old, new = split(rows(1000), 100, None, seed=0), split(rows(1020), 100, None, seed=0)
    added = ids(rows(20, start=1000))
    # A new prompt takes at most its own place; no old one moves from train to heldout but for a changed quota.
    assert len(ids(old.heldout) - ids(new.heldout)) <= len(added & ids(new.heldout)) + 1
    assert len(ids(new.heldout) - ids(old.heldout) - added) <= 1


@pytest.mark.parametrize(("count", "heldout"), [(4, 2), (5, 2), (40, 20), (1024, 512), (1025, 512)])
def test_at_most_half_is_held_out(count: int, heldout: int) -> None:
    parts = split(rows(count), heldout=512, max_train=None, seed=0)
    assert parts.heldout.height == heldout
    assert parts.train.height == count - heldout
