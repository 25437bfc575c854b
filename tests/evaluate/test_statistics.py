import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from textcraftor.config import EvaluateConfig
from textcraftor.errors import PromptError, RewardError
from textcraftor.evaluate import statistics
from textcraftor.evaluate.statistics import compare, confidence_interval, prompt_means

CONFIG = EvaluateConfig(judges=("judge",), bootstrap=500)


def table(values: NDArray[np.float64], **columns: NDArray[np.float64]) -> pl.DataFrame:
    """values: (prompts, images), the judge's scores."""
    prompts, images = values.shape
    ids = [f"{row:04x}" for row in range(prompts) for _ in range(images)]
    frame = pl.DataFrame(
        {
            "prompt_id": ids,
            "prompt": [f"prompt {each}" for each in ids],
            "seed": list(range(prompts * images)),
            "image_index": list(range(images)) * prompts,
            "judge": values.ravel(),
            "diversity": np.full(values.size, 0.5),
        }
    )
    return frame.with_columns(**{name: pl.Series(each.ravel()) for name, each in columns.items()})


def judged(candidate: pl.DataFrame, base: pl.DataFrame, config: EvaluateConfig = CONFIG) -> dict[str, float]:
    return compare(candidate, base, ("judge",), (), config)["judges"]["judge"]


def test_figures_computed_by_hand():
    base = table(np.array([[1.0, 3.0], [2.0, 2.0], [5.0, 5.0], [0.0, 1.0]]))
    candidate = table(np.array([[4.0, 2.0], [2.0, 2.0], [4.0, 4.0], [3.0, 0.0]]))
    figures = judged(candidate, base)  # of prompts: 3, 2, 4, 1.5 against 2, 2, 5, 0.5
    assert figures["mean"] == 2.625
    assert figures["base_mean"] == 2.375
    assert figures["delta"] == 0.25
    assert figures["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert -1 <= figures["ci_low"] <= 0.25 <= figures["ci_high"] <= 1


def test_the_base_compared_with_itself_has_no_difference():
    base = table(np.random.default_rng(0).normal(size=(20, 4)))
    figures = compare(base, base, ("judge",), (), CONFIG)
    assert [figures["judges"]["judge"][key] for key in ("delta", "ci_low", "ci_high", "win_rate")] == [0, 0, 0, 0.5]
    assert figures["diversity"]["ratio"] == 1
    assert figures["n_prompts"] == 20


def test_differences_of_rounding_are_ties():
    base = table(np.full((10, 2), 0.5))
    assert judged(table(np.full((10, 2), 0.5 + 1e-8)), base)["win_rate"] == 0.5
    assert judged(table(np.full((10, 2), 0.5 + 1e-4)), base)["win_rate"] == 1


def test_interval_covers_the_truth_about_95_times_in_100():
    """300 experiments at once, one a judge: skewed effects of true mean .3, differing from prompt to prompt."""
    rng = np.random.default_rng(1)
    truth, prompts, images = 0.3, 60, 2
    names = [f"run{number}" for number in range(300)]
    scene = rng.normal(size=(len(names), prompts, 1))
    effect = truth + rng.gamma(2, 0.5, size=(len(names), prompts, 1)) - 1
    noise = rng.normal(size=(2, len(names), prompts, images))
    empty = np.zeros((prompts, images))
    base = table(empty, **dict(zip(names, scene + noise[0], strict=True)))
    candidate = table(empty, **dict(zip(names, scene + effect + noise[1], strict=True)))
    figures = compare(candidate, base, names, (), CONFIG)["judges"].values()
    covered = np.mean([each["ci_low"] <= truth <= each["ci_high"] for each in figures])
    assert 0.91 <= covered <= 0.98  # .945 give or take three standard errors


def test_the_lower_end_holds_for_a_few_large_losses():
    """1,000 experiments of 30 prompts, most a little better, few much worse: how often the lower end lies above the truth.

    2.5 % is nominal; a percentile interval has 6.5 %, and would promote that many candidates that are no better.
    """
    deltas = 1 - np.random.default_rng(2).exponential(size=(30, 1000))  # true mean 0
    low, high = confidence_interval(deltas, 1000, seed=0)
    assert (low > 0).mean() < 0.05
    assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.98


@pytest.mark.parametrize("values", [[0.0] * 39 + [1.0], [0.0, 1.0] * 20, [0.0] * 40, [1e-9] * 39 + [5.0], [0.25, -0.25]])
def test_the_interval_is_finite_and_contains_the_mean(values):
    deltas = np.array(values)[:, None]
    low, high = confidence_interval(deltas, 500, seed=0)
    assert min(values) <= low[0] <= deltas.mean() <= high[0] <= max(values)


def test_pairing_removes_the_difficulty_of_prompts():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(scale=10, size=(100, 1))
    base = table(difficulty + rng.normal(size=(100, 2)))
    paired = judged(table(difficulty + 0.5 + rng.normal(size=(100, 2))), base)
    shuffled = judged(table(rng.permutation(difficulty) + 0.5 + rng.normal(size=(100, 2))), base)
    assert paired["ci_low"] > 0
    assert shuffled["ci_high"] - shuffled["ci_low"] > 5 * (paired["ci_high"] - paired["ci_low"])


def test_prompts_are_resampled_not_images():
    """Four copies of an image are no more evidence than one."""
    rng = np.random.default_rng(3)
    base, candidate = rng.normal(size=(50, 1)), rng.normal(size=(50, 1))
    once = judged(table(candidate), table(base))
    four_times = judged(table(candidate.repeat(4, 1)), table(base.repeat(4, 1)))
    assert four_times == pytest.approx(once)


def test_figures_depend_on_the_seed_and_not_on_the_order_of_rows(monkeypatch):
    rng = np.random.default_rng(4)
    base, candidate = table(rng.normal(size=(30, 3))), table(rng.normal(size=(30, 3)))
    expected = compare(candidate, base, ("judge",), (), CONFIG)
    shuffled = compare(
        candidate.sample(fraction=1, shuffle=True, seed=1),
        base.sample(fraction=1, shuffle=True, seed=2),
        ("judge",),
        (),
        CONFIG,
    )
    assert shuffled == expected
    other = compare(candidate, base, ("judge",), (), CONFIG.model_copy(update={"seed": 1}))
    assert other["judges"]["judge"]["ci_low"] != expected["judges"]["judge"]["ci_low"]
    monkeypatch.setattr(statistics, "BLOCK", 100)
    assert compare(candidate, base, ("judge",), (), CONFIG) == expected


def test_figures_name_trained_judges_and_the_change_of_diversity():
    base = table(np.ones((5, 2)), other=np.ones((5, 2)))
    collapsed = base.with_columns(diversity=pl.lit(0.1))
    figures = compare(collapsed, base, ("judge", "other"), ("judge",), CONFIG)
    assert [figures["judges"][name]["trained_on"] for name in ("judge", "other")] == [True, False]
    assert figures["diversity"]["ratio"] == pytest.approx(0.2)
    assert figures["diversity"]["delta"] == pytest.approx(-0.4)


def test_there_is_no_ratio_to_a_diversity_of_zero():
    flat = table(np.ones((5, 2))).with_columns(diversity=pl.lit(0.0))
    assert compare(flat, flat, ("judge",), (), CONFIG)["diversity"]["ratio"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_score_that_is_not_finite_names_judge_and_prompt(value):
    base = table(np.ones((3, 2)))
    broken = base.with_columns(
        judge=pl.when((pl.col("prompt_id") == "0001") & (pl.col("image_index") == 1)).then(value).otherwise("judge")
    )
    with pytest.raises(RewardError, match=r"candidate's.*'judge' gave .* for prompt 'prompt 0001' \(1 such"):
        judged(broken, base)
    with pytest.raises(RewardError, match="base's"):
        judged(base, broken)


def test_a_missing_judge_is_named():
    base = table(np.ones((3, 2)))
    with pytest.raises(RewardError, match="no scores of 'oracle'"):
        compare(base, base, ("oracle",), (), CONFIG)


def test_unpaired_scores_are_refused():
    base = table(np.ones((3, 2)))
    with pytest.raises(PromptError, match=r"candidate lacks 2 images, the first for prompt 'prompt 0002'"):
        judged(base.head(4), base)
    with pytest.raises(PromptError, match="base lacks 6"):
        judged(pl.concat([base, base.with_columns(seed=pl.col("seed") + 100)]), base)
    with pytest.raises(PromptError, match="more than once"):
        judged(pl.concat([base, base]), base)
    with pytest.raises(PromptError, match="at least 2 prompts"):
        judged(base.head(2), base.head(2))


def test_prompt_means_are_sorted_by_id():
    values = table(np.array([[1.0, 3.0], [5.0, 5.0]]), other=np.array([[0.0, 1.0], [1.0, 1.0]]))
    means = prompt_means(values.reverse(), ("judge", "other"))
    assert means.tolist() == [[2, 0.5], [5, 1]]
