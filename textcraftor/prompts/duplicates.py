"""Near duplicates: prompts whose sets of word pairs overlap by at least a given Jaccard similarity.

An exact set-similarity join by prefix filtering (Chaudhuri, Ganti and Kaushik, "A Primitive Operator
for Similarity Joins in Data Cleaning", ICDE 2006; Bayardo, Ma and Srikant, "Scaling Up All Pairs
Similarity Search", WWW 2007). With the shingles of every prompt ordered from rare to common, two
prompts can only have similarity t when they share one of their first `n - ceil(t n) + 1` shingles. So
only prompts that share a rare shingle are compared, and unlike with MinHash no pair is missed.
"""

from collections.abc import Iterator

import polars as pl

# Candidate pairs in memory at a time; does not change the result.
PAIRS_AT_ONCE = 20_000_000


def near_duplicates(prompts: pl.Series, threshold: float) -> pl.DataFrame:
    """All pairs of rows with a Jaccard similarity of at least `threshold` over their shingles.

    threshold: in (0, 1].  Returns columns `row`, `earlier` (row > earlier) and `similarity`, sorted.
    A shingle is two neighbouring words, ignoring case and punctuation, so word order counts: "a cat on a
    dog" is not "a dog on a cat". A prompt of one word is its own shingle; a prompt without words has no
    near duplicate.
    """
    shingles = _shingles(prompts)
    common = pl.len().over("shingle")
    size = pl.len().over("row")
    ordered = shingles.with_columns(common.alias("common"), size.cast(pl.Int64).alias("size")).sort("row", "common", "shingle")
    # The tolerance absorbs rounding: 0.9 * 10 must need nine shingles, not ten.
    needed = (pl.col("size") * threshold - 1e-9).ceil().cast(pl.Int64)
    position = pl.int_range(pl.len()).over("row")
    prefixes = ordered.filter(position < pl.col("size") - needed + 1).select("row", "shingle", "size")
    found = [_verified(pairs, shingles, threshold) for pairs in _candidates(prefixes, threshold)]
    nothing = pl.DataFrame(schema={"row": pl.UInt32, "earlier": pl.UInt32, "similarity": pl.Float64})
    return pl.concat([nothing, *found]).unique(["row", "earlier"]).sort("row", "earlier")


def _shingles(prompts: pl.Series) -> pl.DataFrame:
    """The distinct shingles of each row: columns `row`, `shingle` (a 64-bit hash of the two words)."""
    words = (
        pl.DataFrame({"word": prompts.str.to_lowercase().str.extract_all(r"\w+")})
        .with_row_index("row")
        .explode("word")
        .drop_nulls("word")
    )
    following = pl.col("word").shift(-1).over("row")
    pairs = words.with_columns(following.alias("next"), pl.len().over("row").alias("count"))
    pairs = pairs.filter(pl.col("next").is_not_null() | (pl.col("count") == 1))
    return pairs.select("row", pl.struct("word", "next").hash().alias("shingle")).unique()


def _candidates(prefixes: pl.DataFrame, threshold: float) -> Iterator[pl.DataFrame]:
    """Pairs of rows that share a prefix shingle and are close enough in size, a bounded number at a time."""
    shared = prefixes.filter(pl.len().over("shingle") > 1).sort("row")
    # A row pairs with at most every other row of its shingle: start a batch where the running total fills one.
    batch = (pl.len().over("shingle").cum_sum() // PAIRS_AT_ONCE).alias("batch")
    for probe in shared.with_columns(batch).partition_by("batch", include_key=False):
        pairs = probe.join(shared, on="shingle", suffix="_earlier").filter(
            pl.col("row") > pl.col("row_earlier"),
            pl.min_horizontal("size", "size_earlier") >= pl.max_horizontal("size", "size_earlier") * threshold - 1e-9,
        )
        yield pairs.select("row", pl.col("row_earlier").alias("earlier"), "size", "size_earlier").unique(["row", "earlier"])


def _verified(pairs: pl.DataFrame, shingles: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """The candidate pairs whose similarity is at least `threshold`."""
    shared = (
        pairs.join(shingles, on="row")
        .join(shingles.rename({"row": "earlier"}), on=["earlier", "shingle"])
        .group_by("row", "earlier", "size", "size_earlier")
        .agg(pl.len().cast(pl.Int64).alias("shared"))
    )
    similarity = pl.col("shared") / (pl.col("size") + pl.col("size_earlier") - pl.col("shared"))
    return shared.select("row", "earlier", similarity.alias("similarity")).filter(pl.col("similarity") >= threshold - 1e-9)
