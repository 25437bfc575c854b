"""The figures that people read: their digits, what got worse, columns that do not collide."""

from itertools import pairwise

import pytest

from textcraftor.evaluate.figures import (
    Claim,
    claim_rows,
    compare_claims,
    headline,
    interval,
    losses,
    number,
    plain_table,
    rule_rows,
    score_rows,
)


def judge(base: float, mean: float, half: float = 0.01, trained_on: bool = False) -> dict[str, object]:
    delta = mean - base
    interval = {"ci_low": delta - half, "ci_high": delta + half}
    return {"base_mean": base, "mean": mean, "delta": delta, **interval, "win_rate": 0.8, "trained_on": trained_on}


METRICS = {
    "n_prompts": 256,
    "judges": {
        "pickscore": judge(14.31512, 16.20826, 0.3, trained_on=True),
        "hpsv2": judge(0.59903, 0.57841),
        "oracle": judge(0.59744, 0.65170),
    },
    "diversity": {**judge(0.9188, 0.8855), "ratio": 0.96377},
}
CLAIMS = [
    Claim("colour", 1424, 0.603, 0.753),
    Claim("count", 1024, 0.557, 0.555),
    Claim("shape", 1424, 0.285, 0.232),
    Claim("plain prompts", 1808, 0.792, 0.710),
]


@pytest.mark.parametrize(
    ("value", "mean", "signed", "shown"),
    [
        (0.59903, 0.6, False, "0.599"),
        (0.05425, 0.6, True, "+0.054"),
        (14.31512, 16.2, False, "14.32"),
        (-0.004494, 5.68, True, "+0.00"),
        (-0.081943, 5.68, True, "-0.08"),
        (812.345, 812.345, False, "812.3"),
    ],
)
def test_a_score_has_the_digits_that_its_scale_needs(value: float, mean: float, signed: bool, shown: str) -> None:
    assert number(value, {"mean": mean, "base_mean": mean}, signed) == shown


def test_what_got_worse_is_said_the_largest_loss_of_claims_first() -> None:
    assert losses(METRICS, CLAIMS) == (
        "Worse than the base: plain prompts -8.2 points, shape -5.3 points, hpsv2 -0.021, diversity x 0.96."
    )
    better = {**METRICS, "judges": {"oracle": METRICS["judges"]["oracle"]}, "diversity": {**judge(0.9, 0.9), "ratio": 1.0}}
    assert losses(better, CLAIMS[:2]) == "Nothing that was measured is worse than the base."


def test_the_first_line_is_plain_with_an_oracle_and_without() -> None:
    assert headline(METRICS, CLAIMS) == "Its pictures show 65% of what the prompts say, the base's 60%."
    judges = {name: METRICS["judges"][name] for name in ("pickscore", "hpsv2")}
    assert headline({**METRICS, "judges": judges}, []).startswith(
        "hpsv2, which it was not trained on, prefers it to the base on 80%"
    )
    judges = {"pickscore": METRICS["judges"]["pickscore"]}
    assert "which it was trained on" in headline({**METRICS, "judges": judges}, [])


def test_claims_are_compared_by_kind_and_by_language() -> None:
    base = {"kind": {"shape": {"held": 30, "of": 100}}, "language": {"plain": {"held": 80, "of": 100}}}
    tuned = {"kind": {"shape": {"held": 25, "of": 100}}, "language": {"plain": {"held": 90, "of": 100}}}
    rows = claim_rows(compare_claims(tuned, base))
    assert [row["claim"] for row in rows] == ["shape", "plain prompts"]
    assert rows[0] == {"claim": "shape", "claims": "100", "base": "30.0%", "tuned": "25.0%", "change": "-5.0 points"}
    assert compare_claims(None, None) == []


def test_columns_do_not_collide() -> None:
    rules = [{"rule": "oracle.delta", "value": 0.05425347155687632, "bound": 0.05, "passed": True, "why": "holds more often"}]
    rules.append({**rules[0], "value": None, "passed": False, "why": "no scores"})
    for rows in (score_rows(METRICS), claim_rows(CLAIMS), rule_rows(rules)):
        lines = plain_table(rows).splitlines()
        assert len(lines) == len(rows) + 1
        for line, row in zip(lines[1:], rows, strict=True):
            cells = [cell for cell in row.values() if cell]
            assert [part for part in line.split("  ") if part.strip()] and all(cell in line for cell in cells)
            for left, right in pairwise(cells):
                assert f"{left}{right}" not in line
    assert "0.054" in plain_table(rule_rows(rules)) and "NOT PASSED" in plain_table(rule_rows(rules))


def test_diversity_is_shown_with_its_ratio() -> None:
    assert score_rows(METRICS)[-1]["difference"] == "x 0.96"
    assert interval(METRICS["judges"]["pickscore"]) == "+1.59 .. +2.19"
