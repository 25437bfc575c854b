"""Comparison of a candidate with the base, judge by judge: differences paired over prompts, with confidence intervals."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from textcraftor.config import EvaluateConfig
from textcraftor.errors import PromptError, RewardError
from textcraftor.evaluate.scores import DIVERSITY

CONFIDENCE = 0.95
TIE = 1e-6  # smaller differences are rounding of single precision
LARGEST_ERROR = 1e6  # standard errors
BLOCK = 4_000_000  # values resampled at a time; bounds memory at about 100 MB

Figures = dict[str, float]


def compare(
    scores: pl.DataFrame,
    base: pl.DataFrame,
    judges: Sequence[str],
    trained_on: Collection[str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """The contents of metrics.json: n_prompts, the figures of each judge, and those of diversity.

    The unit is the prompt: its images are averaged first, because they are not independent.  `delta` is the mean
    over prompts of candidate minus base; `ci_low`..`ci_high` its 95 % interval (`confidence_interval`); `win_rate` the
    share of prompts on which the candidate is better, a tie counts half.

    Raises PromptError when prompts or noise of the two differ, RewardError when a judge is missing or a score is not
    finite.
    """
    _require_pairs(scores, base)
    columns = (*judges, DIVERSITY)
    for side, table in (("candidate", scores), ("base", base)):
        for column in columns:
            if fault := score_fault(table, column):
                raise RewardError(f"The {side}'s scores cannot be compared: {fault}")
    candidate_means, base_means = prompt_means(scores, columns), prompt_means(base, columns)
    figures = _figures(candidate_means, base_means, columns, config)
    spread = figures.pop(DIVERSITY)
    ratio = spread["mean"] / spread["base_mean"] if spread["base_mean"] > 0 else None
    return {
        "n_prompts": len(candidate_means),
        "judges": {name: {**values, "trained_on": name in trained_on} for name, values in figures.items()},
        "diversity": {**spread, "ratio": ratio},
    }


def score_fault(table: pl.DataFrame, column: str) -> str | None:
    """Why a judge's column cannot be used: it is missing, or a score is not finite (for which prompt); None if it can."""
    if column not in table.columns:
        return f"there are no scores of {column!r}"
    broken = table.filter(pl.col(column).is_finite().not_() | pl.col(column).is_null())
    if broken.is_empty():
        return None
    prompt, value = broken.select("prompt", column).row(0)
    return f"{column!r} gave {value} for prompt {prompt!r} ({broken.height} such scores)"


def prompt_means(table: pl.DataFrame, columns: Sequence[str]) -> NDArray[np.float64]:
    """(P, len(columns)): mean over the images of each prompt, prompts sorted by id."""
    ordered = table.sort("prompt_id", "image_index")
    _, starts, counts = np.unique(ordered["prompt_id"].to_numpy(), return_index=True, return_counts=True)
    values = ordered.select(columns).to_numpy().astype(np.float64)
    return np.asarray(np.add.reduceat(values, starts, axis=0) / counts[:, None])


def confidence_interval(deltas: NDArray[np.float64], resamples: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    """(low, high), each (columns,): the 95 % studentised bootstrap interval of each column's mean.

    deltas: (prompts, columns), a row a prompt; rows are resampled with replacement, the same draws for every column.
    Each resample's error is divided by its own standard error, so that skewed deltas get an asymmetric interval.  An end
    beyond the smallest or largest delta is cut there.  Source: Efron and Tibshirani 1993, section 12.5 (bootstrap-t).
    Coverage against percentile and BCa intervals: docs/decisions/scores-and-gate.md.
    """
    mean = deltas.mean(0)
    centred = deltas - mean
    errors = _studentised_errors(centred, resamples, seed)
    high_error, low_error = np.quantile(errors, [(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], axis=0)
    standard_error = np.sqrt((centred**2).mean(0) / (len(deltas) - 1))
    least, most = deltas.min(0), deltas.max(0)
    low, high = mean - high_error * standard_error, mean - low_error * standard_error
    return np.where(least == most, mean, low.clip(least, most)), np.where(least == most, mean, high.clip(least, most))


def _figures(
    candidate_means: NDArray[np.float64],
    base_means: NDArray[np.float64],
    columns: Sequence[str],
    config: EvaluateConfig,
) -> dict[str, Figures]:
    deltas = candidate_means - base_means
    low, high = confidence_interval(deltas, config.bootstrap, config.seed)
    wins = np.where(np.abs(deltas) <= TIE, 0.5, (deltas > 0).astype(float)).mean(0)
    names = ("mean", "base_mean", "delta", "ci_low", "ci_high", "win_rate")
    values = np.stack([candidate_means.mean(0), base_means.mean(0), deltas.mean(0), low, high, wins], axis=1)
    return {column: dict(zip(names, row, strict=True)) for column, row in zip(columns, values.tolist(), strict=True)}


def _studentised_errors(centred: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, columns): the mean of each resample of `centred`, whose mean is 0, over that resample's standard error.

    By gather and mean: a matrix product would be faster, but its last digit depends on the number of threads.
    """
    rng = np.random.default_rng(seed)
    prompts = len(centred)
    block = max(1, BLOCK // centred.size)
    errors = []
    for start in range(0, resamples, block):
        drawn = centred[rng.integers(prompts, size=(min(block, resamples - start), prompts))]
        mean = drawn.mean(1)
        variance = ((drawn**2).mean(1) - mean**2).clip(min=0) / (prompts - 1)
        # A resample of one value alone has no spread: its error counts as beyond every other.
        errors.append(mean / np.sqrt(variance).clip(min=np.abs(mean) / LARGEST_ERROR + np.finfo(float).tiny))
    return np.concatenate(errors)


def _require_pairs(scores: pl.DataFrame, base: pl.DataFrame) -> None:
    keys = ["prompt_id", "image_index", "seed"]
    for side, missing in (
        ("candidate", base.join(scores, on=keys, how="anti")),
        ("base", scores.join(base, on=keys, how="anti")),
    ):
        if not missing.is_empty():
            raise PromptError(
                f"Candidate and base were not generated from the same prompts and noise: the {side} lacks "
                f"{missing.height} images, the first for prompt {missing['prompt'][0]!r}. Evaluate both again"
            )
    repeated = [side for side, table in (("candidate", scores), ("base", base)) if table.select(keys).is_duplicated().any()]
    if scores["prompt_id"].n_unique() < 2:
        raise PromptError("A comparison needs at least 2 prompts: one alone says nothing about chance")
    if repeated:
        raise PromptError(f"The {repeated[0]}'s scores hold one image more than once. Evaluate it again")
