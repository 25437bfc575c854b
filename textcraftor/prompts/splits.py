"""Which prompts are held out: decided by each prompt's hash alone, so that no prompt ever changes sides.

A prompt is held out when the hash of its id and the seed, read as a fraction, lies below `prompts.heldout_share`. The
size of the set, its order, its other prompts, and how many prompts are evaluated on or trained on have no part in it:
what was trained on once is never evaluated on later, and the other way round.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import polars as pl

# One prompt has no spread. How many a verdict needs is the gate's business (gate.min_prompts).
FEWEST_HELDOUT: Final = 2


@dataclass(frozen=True, slots=True)
class Split:
    """The rows given to `split`: trained on, evaluated on, and left over.

    reserve: held out, but more than are evaluated on; never trained on.  surplus: more than `max_train`.
    """

    train: pl.DataFrame
    heldout: pl.DataFrame
    reserve: pl.DataFrame
    surplus: pl.DataFrame


def split(
    rows: pl.DataFrame,
    heldout: int,
    share: float,
    max_train: int | None,
    seed: int,
    held_out_sources: Collection[str] = (),
) -> Split:
    """Hold out by hash; of what is held out evaluate on at most `heldout`, of the rest train on at most `max_train`.

    rows: distinct prompts with columns `prompt_id`, `category` and `source`.  Each category is evaluated on by its share
    of all rows, as far as it has held-out prompts.
    held_out_sources: where there are any, the rows of these `source`s are the held-out ones, whatever their hash.
    """
    ranked = rows.with_columns(pl.Series("rank", _ranks(rows["prompt_id"], seed), dtype=pl.String)).sort("rank")
    if held_out_sources:
        pool = ranked.filter(pl.col("source").is_in(held_out_sources)).drop("rank")
        rest = ranked.filter(~pl.col("source").is_in(held_out_sources)).drop("rank")
        chosen = pl.int_range(pool.height, eager=True) < heldout
    else:
        held_out = is_held_out(ranked["prompt_id"], share, seed)
        pool, rest = ranked.filter(held_out).drop("rank"), ranked.filter(~held_out).drop("rank")
        chosen = _stratified(pool["category"], rows["category"], heldout)
    trained = rest.height if max_train is None else min(max_train, rest.height)
    return Split(
        train=rest.head(trained),
        heldout=pool.filter(chosen),
        reserve=pool.filter(~chosen),
        surplus=rest.tail(rest.height - trained),
    )


def is_held_out(prompt_ids: Iterable[str], share: float, seed: int) -> pl.Series:
    """Whether each prompt is held out: whether its hash, as a fraction of 1, lies below `share`."""
    return pl.Series([int(rank, 16) < share * 2**64 for rank in _ranks(prompt_ids, seed)], dtype=pl.Boolean)


def _ranks(prompt_ids: Iterable[str], seed: int) -> list[str]:
    """64 bits of each prompt's hash, as hex digits."""
    return [hashlib.sha256(f"{seed}:{prompt_id}".encode()).hexdigest()[:16] for prompt_id in prompt_ids]


def _stratified(pool: pl.Series, categories: pl.Series, count: int) -> pl.Series:
    """Which rows of the pool to take: the first of each category up to its quota, then the first of any.

    pool: the category of each row, in the order of preference.  categories: of all prompts, which set the quotas.
    """
    quotas = _quotas(categories, count)
    frame = pl.DataFrame({"category": pool}).with_row_index("row")
    position = pl.int_range(pl.len()).over("category")
    over_quota = position >= pl.col("category").replace_strict(quotas, return_dtype=pl.Int64)
    taken = frame.sort(over_quota, "row").head(count)["row"]
    return pl.int_range(len(pool), eager=True).is_in(taken.implode())


def _quotas(category: pl.Series, count: int) -> dict[str, int]:
    """How many of `count` rows each category gets: proportional, the largest remainders rounded up."""
    counts = dict(category.value_counts().sort(category.name).iter_rows())
    count = min(count, len(category))
    exact = {name: of * count / len(category) for name, of in counts.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    remainders = sorted(counts, key=lambda name: (quotas[name] - exact[name], name))
    for name in remainders[: count - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
