import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from tests.evaluate.synthetic import IMAGES, RULES, gate_config, scored, three_candidates
from textcraftor.config import Config
from textcraftor.evaluate.gate import against_champion, decide, gate, markdown
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import write_signed


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return gate_config(tmp_path)


@pytest.fixture
def scores() -> dict[str, Scores]:
    return three_candidates()


def failed(record, name):
    return [rule["rule"] for rule in record["candidates"][name]["rules"] if not rule["passed"]]


def test_the_passing_candidate_with_the_best_rank_wins(scores, config):
    record = decide(scores, config)
    assert record["passed"]
    assert record["winner"] == "aesthetic"
    balanced = record["candidates"]["balanced"]
    assert balanced["passed"]
    assert balanced["digest"] == "digest of balanced"
    asked = [f"{rule['judge']}.{rule['metric']}" for rule in RULES]
    assert [rule["rule"] for rule in balanced["rules"]] == [*asked, "heldout.held_out", "oracle.held_out"]
    first = balanced["rules"][0]
    assert first == {
        "rule": "oracle.delta",
        "judge": "oracle",
        "metric": "delta",
        "value": balanced["metrics"]["judges"]["oracle"]["delta"],
        "bound": 0.05,
        "passed": True,
        "why": "claims hold more often",
    }
    assert first["value"] == pytest.approx(0.2, abs=0.01)


def test_a_failing_candidate_does_not_win_by_a_better_rank(scores, config):
    scores["aesthetic"] = scored("aesthetic", oracle=-0.1, heldout=5)
    record = decide(scores, config)
    assert record["winner"] == "balanced"
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]


def test_a_collapsed_candidate_fails_by_diversity_alone(scores, config):
    scores["aesthetic"] = scored("aesthetic", oracle=0.4, heldout=9, spread=0.44)
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["diversity.ratio"]
    assert record["winner"] == "balanced"


def test_a_candidate_equal_to_the_base_fails(scores, config):
    record = decide({**scores, "balanced": scores["base"], "aesthetic": scores["base"]}, config)
    assert not record["passed"]
    assert record["winner"] is None
    # A bound is reached by what equals it: an interval of nothing at all is not below zero.
    assert failed(record, "balanced") == ["oracle.delta"]


def test_equals_are_ranked_by_name(scores, config):
    scores["balanced"] = scores["aesthetic"]
    assert decide(scores, config)["winner"] == "aesthetic"


def test_missing_scores_fail_and_say_what_to_run(scores, config):
    del scores["aesthetic"]
    record = decide(scores, config)
    assert record["winner"] == "balanced"
    missing = record["candidates"]["aesthetic"]
    assert (missing["passed"], missing["digest"], missing["metrics"]) == (False, None, None)
    assert all("textcraftor evaluate --candidate aesthetic" in rule["why"] for rule in missing["rules"])
    assert not any(rule["passed"] for rule in missing["rules"])


def test_no_candidate_passes_without_the_base(scores, config):
    del scores["base"]
    record = decide(scores, config)
    assert not record["passed"]
    assert "base has no scores" in record["candidates"]["balanced"]["rules"][0]["why"]


def broken(scores: Scores, judge: str, value: float | None = float("nan")) -> Scores:
    row = pl.int_range(pl.len()) == 3
    table = scores.table.with_columns(pl.when(row).then(value).otherwise(judge).alias(judge))
    return replace(scores, table=table)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_score_that_is_not_finite_fails_the_rules_of_its_judge_only(scores, config, value):
    scores["aesthetic"] = broken(scores["aesthetic"], "oracle", value)
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]
    assert "'oracle' gave" in record["candidates"]["aesthetic"]["rules"][0]["why"]
    assert record["winner"] == "balanced"
    json.dumps(record, allow_nan=False)


def test_a_base_score_that_is_not_finite_fails_every_candidate(scores, config):
    scores["base"] = broken(scores["base"], "oracle")
    record = decide(scores, config)
    assert not record["passed"]
    assert record["candidates"]["balanced"]["rules"][0]["why"].startswith("base: 'oracle' gave nan")


def test_a_judge_without_scores_fails_its_rules(scores, config):
    scores["aesthetic"] = replace(scores["aesthetic"], judges=("aesthetic",), table=scores["aesthetic"].table.drop("oracle"))
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]
    assert "no scores of 'oracle'" in record["candidates"]["aesthetic"]["rules"][0]["why"]


def test_diversity_that_is_not_finite_fails_the_candidate(scores, config):
    scores["aesthetic"] = broken(scores["aesthetic"], "diversity")
    record = decide(scores, config)
    assert "diversity.ratio" in failed(record, "aesthetic")
    assert record["winner"] == "balanced"


def test_a_candidate_that_cannot_be_ranked_fails(scores, config):
    rules = tuple(rule for rule in config.gate.rules if rule.judge != "heldout")
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"rules": rules})})
    scores["aesthetic"] = broken(scores["aesthetic"], "heldout")
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["heldout.delta"]
    assert record["winner"] == "balanced"


def test_a_rule_on_a_metric_that_its_judge_lacks_fails(scores, config):
    rule = config.gate.rules[0].model_copy(update={"metric": "ratio"})
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"rules": (rule,)})})
    record = decide(scores, config)
    assert record["candidates"]["balanced"]["rules"][0]["why"] == "oracle has no ratio"
    assert not record["passed"]


def test_scores_of_other_prompts_than_the_base_fail(scores, config):
    other = scores["aesthetic"].table.with_columns(seed=pl.col("seed") + 1000)
    scores["aesthetic"] = replace(scores["aesthetic"], table=other)
    record = decide(scores, config)
    assert "same prompts and noise" in record["candidates"]["aesthetic"]["rules"][0]["why"]
    assert record["winner"] == "balanced"


@pytest.mark.parametrize("prompts", [2, 29])
def test_too_few_prompts_fail_every_rule(scores, config, prompts):
    few = {name: replace(each, table=each.table.head(prompts * IMAGES)) for name, each in scores.items()}
    record = decide(few, config)
    assert not record["passed"]
    compared = [rule for rule in record["candidates"]["balanced"]["rules"] if rule["metric"] != "held_out"]
    assert {rule["why"] for rule in compared} == {f"too few prompts: {prompts}, need 30 (gate.min_prompts)"}
    (rule,) = against_champion(few["balanced"], few["aesthetic"], config)
    assert not rule["passed"] and rule["why"].startswith(f"too few prompts: {prompts}, need 30")


def test_the_verdict_is_a_pure_function_of_the_scores(scores, config):
    before = {name: each.table.clone() for name, each in scores.items()}
    first = decide(scores, config)
    assert decide(dict(reversed(scores.items())), config) == first
    assert all(each.table.equals(before[name]) for name, each in scores.items())


def test_writing_the_record_twice_gives_the_same_bytes(scores, config, tmp_path):
    for each in (*scores.values(), scored("stranger", oracle=0.5, heldout=9)):
        write_signed(each, tmp_path)
    path = gate(config, tmp_path)
    written = path.read_bytes(), path.with_suffix(".md").read_bytes()
    assert json.loads(written[0]) == decide(scores, config)  # and the stranger is none of this run's candidates
    gate(config, tmp_path)
    assert (path.read_bytes(), path.with_suffix(".md").read_bytes()) == written


def test_scores_that_evaluation_did_not_sign_do_not_count(scores, config, tmp_path):
    def reasons():
        candidates = json.loads(gate(config, tmp_path).read_text())["candidates"]
        return {name: record["rules"][0]["why"] for name, record in candidates.items() if not record["passed"]}

    assert reasons()["balanced"].startswith("balanced has no scores. Run `textcraftor evaluate --candidate balanced`")
    for each in scores.values():
        write_signed(each, tmp_path)
    assert not reasons()
    signed = tmp_path / "data/scores/balanced.parquet"
    replace(scores["balanced"], table=scores["balanced"].table.with_columns(pl.col("oracle") + 1)).write(signed)
    again = ". Run `textcraftor evaluate --candidate balanced` again"
    assert reasons() == {"balanced": f"balanced.parquet was changed after it was signed{again}"}
    signed.write_bytes(b"no table")
    assert reasons() == {"balanced": f"balanced.parquet was changed after it was signed{again}"}
    (tmp_path / "data/scores/balanced.dsse.json").unlink()
    assert reasons() == {"balanced": f"balanced.dsse.json is missing{again}"}
    (tmp_path / "data/scores/base.dsse.json").write_text("{}")
    assert (
        set(reasons()) == {"balanced", "aesthetic"}
        and "base.parquet: its signed statement is damaged" in reasons()["aesthetic"]
    )


def test_markdown_shows_verdict_value_bound_and_reason(scores, config):
    scores["balanced"] = scored("balanced", oracle=0.2, heldout=0.1, spread=0.1)
    text = markdown(decide(scores, config))
    assert "**aesthetic** wins." in text
    assert "## balanced: failed" in text
    assert "| diversity.ratio | 0.2000 | 0.9000 | **failed** | no collapse |" in text
    assert "**No candidate passes.**" in markdown(decide({}, config))


def test_comparison_with_the_champion_by_margin(scores, config):
    champion = scores["balanced"]
    better, worse = scored("new", oracle=0.3, seed=3), scored("new", oracle=0.1, seed=3)
    hardly_worse = scored("new", oracle=0.19, seed=3)
    assert [rule["passed"] for rule in against_champion(better, champion, config)] == [True]
    assert [rule["passed"] for rule in against_champion(hardly_worse, champion, config)] == [True]
    (rule,) = against_champion(worse, champion, config)
    assert (rule["rule"], rule["bound"], rule["passed"]) == ("champion.oracle.ci_low", -0.02, False)
    assert rule["value"] == pytest.approx(-0.1, abs=0.01)
    (rule,) = against_champion(broken(better, "oracle"), champion, config)
    assert not rule["passed"]
    assert "gave nan" in rule["why"]
