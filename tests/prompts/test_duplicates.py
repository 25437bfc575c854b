import random
import re
from itertools import pairwise

import polars as pl
import pytest

from textcraftor.prompts import duplicates
from textcraftor.prompts.duplicates import near_duplicates


def shingles(prompt: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", prompt.lower())
    return set(pairwise(words)) or {(word,) for word in words}


def by_comparing_all(prompts: list[str], threshold: float) -> set[tuple[int, int]]:
    """Compare all pairs."""
    sets = [shingles(prompt) for prompt in prompts]
    return {
        (row, earlier)
        for row in range(len(sets))
        for earlier in range(row)
        if sets[row] | sets[earlier] and len(sets[row] & sets[earlier]) / len(sets[row] | sets[earlier]) >= threshold - 1e-12
    }


def variations(count: int) -> list[str]:
    """Random sentences, half of them edits of earlier ones."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    prompts: list[list[str]] = []
    for _ in range(count):
        if prompts and rng.random() < 0.5:
            edited = list(rng.choice(prompts))
            edited[rng.randrange(len(edited))] = rng.choice(words)
            prompts.append(edited + rng.choices(words, k=rng.randrange(2)))
        else:
            prompts.append(rng.choices(words, k=rng.randrange(1, 25)))
    return [" ".join(prompt) for prompt in prompts]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_result_equals_the_comparison_of_all_pairs(threshold: float) -> None:
    prompts = variations(400)
    expected = by_comparing_all(prompts, threshold)
    assert expected
    found = near_duplicates(pl.Series(prompts), threshold)
    assert set(found.select("row", "earlier").iter_rows()) == expected
    assert found["similarity"].min() >= threshold - 1e-9


def test_small_batches_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = pl.Series(variations(300))
    whole = near_duplicates(prompts, 0.5)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 50)
    assert near_duplicates(prompts, 0.5).equals(whole)


def test_case_and_punctuation_do_not_count_but_word_order_does() -> None:
    prompts = pl.Series(["A cat, on a dog!", "a cat on a dog", "a dog on a cat"])
    assert near_duplicates(prompts, 0.95).rows() == [(1, 0, 1.0)]


@pytest.mark.parametrize("prompts", [[], ["", "!!!", "🙂"], ["one prompt alone"], ["word", "other"]])
def test_prompts_without_near_duplicates(prompts: list[str]) -> None:
    assert near_duplicates(pl.Series(prompts, dtype=pl.String), 0.5).is_empty()


def test_a_word_without_neighbours_is_its_own_shingle() -> None:
    assert near_duplicates(pl.Series(["Wood", "wood."]), 0.9).rows() == [(1, 0, 1.0)]
