"""Candidate against base, judge by judge: paired over prompts, with what chance alone could do."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from textcraftor.config import EvaluateConfig
from textcraftor.errors import PromptError, RewardError
from textcraftor.evaluate.scores import DIVERSITY

CONFIDENCE = 0.95
TIE = 1e-6  # scores nearer than this are one: single precision tells no more
BLOCK = 4_000_000  # values resampled at a time, which bounds memory at some tens of MB

Figures = dict[str, float]


def compare(
    scores: pl.DataFrame,
    base: pl.DataFrame,
    judges: Sequence[str],
    trained_on: Collection[str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """The figures of metrics.json: n_prompts, each judge's figures, and those of diversity.

    The unit is the prompt: its images are averaged first, because they are not independent.  `delta` is the mean
    over prompts of candidate minus base; `ci_low`..`ci_high` its 95 % percentile bootstrap interval, prompts
    resampled in pairs; `win_rate` the share of prompts on which the candidate is better, a tie counts half.

    Raises PromptError when the two were not drawn from the same prompts and noise, RewardError when a judge is
    missing or gave a score that is no number.
    """
    _require_pairs(scores, base)
    columns = (*judges, DIVERSITY)
    for side, table in (("candidate", scores), ("base", base)):
        for column in columns:
            if fault := fault_of(table, column):
                raise RewardError(f"The {side}'s scores cannot be compared: {fault}")
    of_candidate, of_base = prompt_means(scores, columns), prompt_means(base, columns)
    figures = _figures(of_candidate, of_base, columns, config)
    spread = figures.pop(DIVERSITY)
    ratio = spread["mean"] / spread["base_mean"] if spread["base_mean"] > 0 else None
    return {
        "n_prompts": len(of_candidate),
        "judges": {name: {**values, "trained_on": name in trained_on} for name, values in figures.items()},
        "diversity": {**spread, "ratio": ratio},
    }


def fault_of(table: pl.DataFrame, column: str) -> str | None:
    """Why a judge's column cannot be used: missing, or a score that is no number (which prompt); None if it can."""
    if column not in table.columns:
        return f"there are no scores of {column!r}"
    broken = table.filter(pl.col(column).is_finite().not_() | pl.col(column).is_null())
    if broken.is_empty():
        return None
    prompt, value = broken.select("prompt", column).row(0)
    return f"{column!r} gave {value} for prompt {prompt!r} ({broken.height} such scores)"


def prompt_means(table: pl.DataFrame, columns: Sequence[str]) -> NDArray[np.float64]:
    """(P, len(columns)): each prompt's mean over its images, prompts in order of their ids."""
    ordered = table.sort("prompt_id", "image_index")
    _, starts, counts = np.unique(ordered["prompt_id"].to_numpy(), return_index=True, return_counts=True)
    values = ordered.select(columns).to_numpy().astype(np.float64)
    return np.asarray(np.add.reduceat(values, starts, axis=0) / counts[:, None])


def _figures(
    of_candidate: NDArray[np.float64],
    of_base: NDArray[np.float64],
    columns: Sequence[str],
    config: EvaluateConfig,
) -> dict[str, Figures]:
    deltas = of_candidate - of_base
    low, high = np.quantile(_resampled_means(deltas, config), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    wins = np.where(np.abs(deltas) <= TIE, 0.5, (deltas > 0).astype(float)).mean(0)
    names = ("mean", "base_mean", "delta", "ci_low", "ci_high", "win_rate")
    values = np.stack([of_candidate.mean(0), of_base.mean(0), deltas.mean(0), low, high, wins], axis=1)
    return {column: dict(zip(names, row, strict=True)) for column, row in zip(columns, values.tolist(), strict=True)}


def _resampled_means(deltas: NDArray[np.float64], config: EvaluateConfig) -> NDArray[np.float64]:
    """(bootstrap, columns): means over prompts drawn with replacement, the same draw for every column.

    By gather and mean: a matrix product would be faster, but its last digit depends on the number of threads.
    """
    rng = np.random.default_rng(config.seed)
    prompts = len(deltas)
    block = max(1, BLOCK // deltas.size)
    sizes = [min(block, config.bootstrap - done) for done in range(0, config.bootstrap, block)]
    return np.concatenate([deltas[rng.integers(prompts, size=(size, prompts))].mean(1) for size in sizes])


def _require_pairs(scores: pl.DataFrame, base: pl.DataFrame) -> None:
    keys = ["prompt_id", "image_index", "seed"]
    for side, missing in (
        ("candidate", base.join(scores, on=keys, how="anti")),
        ("base", scores.join(base, on=keys, how="anti")),
    ):
        if not missing.is_empty():
            raise PromptError(
                f"Candidate and base were not drawn from the same prompts and noise: the {side} lacks "
                f"{missing.height} images, the first for prompt {missing['prompt'][0]!r}. Evaluate both again"
            )
    repeated = [side for side, table in (("candidate", scores), ("base", base)) if table.select(keys).is_duplicated().any()]
    if scores["prompt_id"].n_unique() < 2:
        raise PromptError("A comparison needs at least 2 prompts: one alone says nothing about chance")
    if repeated:
        raise PromptError(f"The {repeated[0]}'s scores hold one image more than once. Evaluate it again")
