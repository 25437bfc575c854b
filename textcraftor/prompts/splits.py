"""Which prompts are held out: drawn by hash, so that the answer survives a growing prompt set.

Every prompt has a place in a fixed, random-looking order that depends on nothing but its own id and
the seed. The first of each category are held out. So new prompts never reshuffle the old ones: each
can at most push the last held-out prompt of its category into train.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import polars as pl

# A paired bootstrap over a single prompt has no width, and would call any difference certain.
FEWEST_HELDOUT: Final = 2


@dataclass(frozen=True, slots=True)
class Split:
    """train and heldout hold the rows given to `split`; `surplus` those beyond `max_train`."""

    train: pl.DataFrame
    heldout: pl.DataFrame
    surplus: pl.DataFrame


def split(rows: pl.DataFrame, heldout: int, max_train: int | None, seed: int, held_out_sources: Collection[str] = ()) -> Split:
    """Hold out `heldout` rows, each category by its share; the rest is train, at most `max_train` of it.

    held_out_sources: where there are any, the rows of these `source`s are the held-out ones, and no others; what is
    more than `heldout` of them is surplus, for they never train.

    rows: distinct prompts with columns `prompt_id` and `category`. Where there are few, at most half
    are held out: training needs prompts too.
    """
    ranks = [_rank(prompt_id, seed) for prompt_id in rows["prompt_id"]]
    ranked = rows.with_columns(pl.Series("rank", ranks, dtype=pl.String)).sort("rank")
    if held_out_sources:
        reserved = pl.col("source").is_in(held_out_sources)
        held, rest = ranked.filter(reserved).drop("rank"), ranked.filter(~reserved).drop("rank")
        train = rest.head(rest.height if max_train is None else max_train)
        surplus = pl.concat([held.tail(max(0, held.height - heldout)), rest.tail(rest.height - train.height)])
        return Split(train=train, heldout=held.head(heldout), surplus=surplus)
    quotas = _quotas(rows["category"], min(heldout, rows.height // 2))
    place = pl.int_range(pl.len()).over("category")
    quota = pl.col("category").replace_strict(quotas, return_dtype=pl.Int64)
    held = ranked.filter(place < quota).drop("rank")
    rest = ranked.filter(place >= quota).drop("rank")
    size = rest.height if max_train is None else min(max_train, rest.height)
    return Split(train=rest.head(size), heldout=held, surplus=rest.tail(rest.height - size))


def _rank(prompt_id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{prompt_id}".encode()).hexdigest()[:16]


def _quotas(category: pl.Series, heldout: int) -> dict[str, int]:
    """Rows to hold out of each category: proportional, the largest remainders rounded up."""
    counts = dict(category.value_counts().sort(category.name).iter_rows())
    exact = {name: count * heldout / len(category) for name, count in counts.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    remainders = sorted(counts, key=lambda name: (quotas[name] - exact[name], name))
    for name in remainders[: heldout - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
