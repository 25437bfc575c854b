"""Coverage of three bootstrap intervals for a mean, by simulation: how often 95 % intervals hold the true mean.

    python -m benchmarks.interval_coverage [--experiments 1000] [--resamples 1000]

Prints, for each distribution of the deltas and each number of prompts, the coverage of the percentile, the BCa and the
studentised interval, and how often the lower end lies above the truth (nominally 2.5 %): those are the candidates that the
gate would pass though they are no better than the base.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from textcraftor.evaluate.statistics import CONFIDENCE, confidence_interval

Array = NDArray[np.float64]
Interval = Callable[[Array, int, int], tuple[Array, ...]]
LEVELS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
PROMPTS = (10, 20, 30, 50, 256)
COLUMNS = 100  # experiments resampled by the same draws


def percentile(deltas: Array, resamples: int, seed: int) -> tuple[Array, ...]:
    low, high = np.quantile(_means(deltas, resamples, seed), LEVELS, axis=0)
    return low, high


def bca(deltas: Array, resamples: int, seed: int) -> tuple[Array, ...]:
    """Efron 1987; the jackknife of a mean has a closed form."""
    means, mean = _means(deltas, resamples, seed), deltas.mean(0)
    below = ((means < mean).mean(0) + (means == mean).mean(0) / 2).clip(0.5 / resamples, 1 - 0.5 / resamples)
    bias, centred = ndtri(below), deltas - mean
    acceleration = (centred**3).sum(0) / (6 * (centred**2).sum(0) ** 1.5).clip(min=np.finfo(float).tiny)
    shifted = [bias + ndtri(level) for level in LEVELS]
    levels = [ndtr(bias + each / (1 - acceleration * each)) for each in shifted]
    ends = [np.array([np.quantile(column, at) for column, at in zip(means.T, level, strict=True)]) for level in levels]
    return ends[0], ends[1]


INTERVALS: dict[str, Interval] = {"percentile": percentile, "BCa": bca, "studentised": confidence_interval}
DELTAS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {  # each of mean 0
    "normal": lambda rng, shape: rng.normal(size=shape),
    "few large gains (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
    "few large losses (exponential)": lambda rng, shape: 1 - rng.exponential(size=shape),
    "few large losses (lognormal)": lambda rng, shape: np.exp(0.5) - rng.lognormal(size=shape),
    "mostly ties (0, +1, -1)": lambda rng, shape: rng.choice([0.0, 1.0, -1.0], p=[0.7, 0.15, 0.15], size=shape),
}


def _means(deltas: Array, resamples: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return np.concatenate([deltas[rng.integers(len(deltas), size=(50, len(deltas)))].mean(1) for _ in range(resamples // 50)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    print(f"{'deltas':32} {'prompts':>7}  " + "  ".join(f"{name:>22}" for name in INTERVALS))
    print(f"{'':32} {'':>7}  " + "  ".join(f"{'coverage / low > truth':>22}" for _ in INTERVALS))
    for name, draw in DELTAS.items():
        for prompts in PROMPTS:
            rng = np.random.default_rng(prompts)
            ends: dict[str, list[tuple[Array, ...]]] = {kind: [] for kind in INTERVALS}
            for seed in range(arguments.experiments // COLUMNS):
                deltas = draw(rng, (prompts, COLUMNS))
                for kind, interval in INTERVALS.items():
                    ends[kind].append(interval(deltas, arguments.resamples, seed))
            figures = []
            for kind in INTERVALS:
                low, high = (np.concatenate(end) for end in zip(*ends[kind], strict=True))
                figures.append(f"{np.mean((low <= 0) & (high >= 0)):>13.1%} / {np.mean(low > 0):>6.1%}")
            print(f"{name:32} {prompts:>7}  " + "  ".join(figures), flush=True)


if __name__ == "__main__":
    main()
