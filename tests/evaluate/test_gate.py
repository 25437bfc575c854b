import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from textcraftor.config import Config, load
from textcraftor.errors import ModelError
from textcraftor.evaluate.gate import against_champion, decide, gate, markdown
from textcraftor.evaluate.scores import Scores

PROMPTS, IMAGES = 40, 2
RULES = [
    {"judge": "oracle", "metric": "delta", "at_least": 0.05, "why": "claims hold more often"},
    {"judge": "oracle", "metric": "ci_low", "at_least": 0.0, "why": "not by chance"},
    {"judge": "heldout", "metric": "win_rate", "at_least": 0.5},
    {"judge": "heldout", "metric": "mean", "at_least": -1.0},
    {"judge": "diversity", "metric": "ratio", "at_least": 0.9, "why": "no collapse"},
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    params = {
        "mixes": ["balanced", "aesthetic"],
        "evaluate": {"judges": ["aesthetic", "heldout", "oracle"], "bootstrap": 300},
        "gate": {"rank_by": "heldout", "rules": RULES},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    resolved = load(tmp_path / "params.yaml")
    return resolved.model_copy(
        update={"gate": resolved.gate.model_copy(update={"champion_margin": {"oracle": 0.02}})}  # and no other judge's
    )


def scored(name: str, oracle: float = 0.0, heldout: float = 0.0, spread: float = 0.5, seed: int = 0) -> Scores:
    """A candidate's scores: shifts of those of the base, with noise of its own."""
    rng = np.random.default_rng(7)
    ids = [f"{row:04x}" for row in range(PROMPTS) for _ in range(IMAGES)]
    table = pl.DataFrame(
        {
            "prompt_id": ids,
            "prompt": [f"prompt {each}" for each in ids],
            "seed": list(range(len(ids))),
            "image_index": list(range(IMAGES)) * PROMPTS,
            "aesthetic": rng.normal(5, 1, len(ids)),
            "heldout": rng.normal(0, 1, len(ids)) + heldout,
            "oracle": rng.normal(0.5, 0.2, len(ids)) + oracle,
            "diversity": spread,
        }
    )
    own = np.random.default_rng(seed)
    noise = {judge: pl.col(judge) + own.normal(0, 0.01, len(ids)) for judge in ("heldout", "oracle")}
    return Scores(name, f"digest of {name}", ("aesthetic", "heldout", "oracle"), (), {}, table.with_columns(**noise))


@pytest.fixture
def scores() -> dict[str, Scores]:
    return {
        "base": scored("base"),
        "balanced": scored("balanced", oracle=0.2, heldout=0.1, seed=1),
        "aesthetic": scored("aesthetic", oracle=0.1, heldout=0.3, seed=2),
    }


def failed(record, name):
    return [rule["rule"] for rule in record["candidates"][name]["rules"] if not rule["passed"]]


def test_the_best_by_rank_of_those_that_pass_wins(scores, config):
    record = decide(scores, config)
    assert record["passed"]
    assert record["winner"] == "aesthetic"
    balanced = record["candidates"]["balanced"]
    assert balanced["passed"]
    assert balanced["digest"] == "digest of balanced"
    assert [rule["rule"] for rule in balanced["rules"]] == [f"{rule['judge']}.{rule['metric']}" for rule in RULES]
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


def test_a_better_rank_does_not_save_who_fails(scores, config):
    scores["aesthetic"] = scored("aesthetic", oracle=-0.1, heldout=5)
    record = decide(scores, config)
    assert record["winner"] == "balanced"
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]


def test_a_collapsed_candidate_fails_by_diversity_alone(scores, config):
    scores["aesthetic"] = scored("aesthetic", oracle=0.4, heldout=9, spread=0.44)
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["diversity.ratio"]
    assert record["winner"] == "balanced"


def test_nobody_passes_who_equals_the_base(scores, config):
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


def test_without_the_base_nobody_passes(scores, config):
    del scores["base"]
    record = decide(scores, config)
    assert not record["passed"]
    assert "base has no scores" in record["candidates"]["balanced"]["rules"][0]["why"]


def broken(scores: Scores, judge: str, value: float | None = float("nan")) -> Scores:
    row = pl.int_range(pl.len()) == 3
    table = scores.table.with_columns(pl.when(row).then(value).otherwise(judge).alias(judge))
    return Scores(scores.candidate, scores.digest, scores.judges, (), {}, table)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_no_number_fails_its_rules_and_no_others(scores, config, value):
    scores["aesthetic"] = broken(scores["aesthetic"], "oracle", value)
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]
    assert "'oracle' gave" in record["candidates"]["aesthetic"]["rules"][0]["why"]
    assert record["winner"] == "balanced"
    json.dumps(record, allow_nan=False)


def test_a_base_without_numbers_fails_everyone(scores, config):
    scores["base"] = broken(scores["base"], "oracle")
    record = decide(scores, config)
    assert not record["passed"]
    assert record["candidates"]["balanced"]["rules"][0]["why"].startswith("base: 'oracle' gave nan")


def test_a_judge_that_was_not_asked_fails(scores, config):
    scores["aesthetic"] = Scores("aesthetic", "d", ("aesthetic",), (), {}, scores["aesthetic"].table.drop("oracle"))
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["oracle.delta", "oracle.ci_low"]
    assert "no scores of 'oracle'" in record["candidates"]["aesthetic"]["rules"][0]["why"]


def test_diversity_that_is_no_number_fails_the_candidate(scores, config):
    scores["aesthetic"] = broken(scores["aesthetic"], "diversity")
    record = decide(scores, config)
    assert "diversity.ratio" in failed(record, "aesthetic")
    assert record["winner"] == "balanced"


def test_who_cannot_be_ranked_does_not_pass(scores, config):
    rules = tuple(rule for rule in config.gate.rules if rule.judge != "heldout")
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"rules": rules})})
    scores["aesthetic"] = broken(scores["aesthetic"], "heldout")
    record = decide(scores, config)
    assert failed(record, "aesthetic") == ["heldout.delta"]
    assert record["winner"] == "balanced"


def test_a_figure_that_a_judge_does_not_have_fails(scores, config):
    rule = config.gate.rules[0].model_copy(update={"metric": "ratio"})
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"rules": (rule,)})})
    record = decide(scores, config)
    assert record["candidates"]["balanced"]["rules"][0]["why"] == "oracle has no ratio"
    assert not record["passed"]


def test_other_prompts_than_the_base_fail(scores, config):
    other = scores["aesthetic"].table.with_columns(seed=pl.col("seed") + 1000)
    scores["aesthetic"] = Scores("aesthetic", "d", scores["aesthetic"].judges, (), {}, other)
    record = decide(scores, config)
    assert "same prompts and noise" in record["candidates"]["aesthetic"]["rules"][0]["why"]
    assert record["winner"] == "balanced"


def test_pure(scores, config):
    before = {name: each.table.clone() for name, each in scores.items()}
    first = decide(scores, config)
    assert decide(dict(reversed(scores.items())), config) == first
    assert all(each.table.equals(before[name]) for name, each in scores.items())


def test_files_are_written_and_are_the_same_again(scores, config, tmp_path):
    for name, each in scores.items():
        each.write(tmp_path / f"data/scores/{name}.parquet")
    scored("stranger", oracle=0.5, heldout=9).write(tmp_path / "data/scores/stranger.parquet")
    path = gate(config, tmp_path)
    written = path.read_bytes(), path.with_suffix(".md").read_bytes()
    assert json.loads(written[0]) == decide(scores, config)  # and the stranger is none of this run's candidates
    gate(config, tmp_path)
    assert (path.read_bytes(), path.with_suffix(".md").read_bytes()) == written


def test_no_scores_at_all_is_a_verdict_and_a_damaged_table_an_error(config, tmp_path):
    assert not json.loads(gate(config, tmp_path).read_text())["passed"]
    (tmp_path / "data/scores").mkdir()
    (tmp_path / "data/scores/base.parquet").write_text("no parquet")
    with pytest.raises(ModelError, match="is not a table of scores"):
        gate(config, tmp_path)


def test_markdown_tells_verdict_value_bound_and_why(scores, config):
    scores["balanced"] = scored("balanced", oracle=0.2, heldout=0.1, spread=0.1)
    text = markdown(decide(scores, config))
    assert "**aesthetic** wins." in text
    assert "## balanced: failed" in text
    assert "| diversity.ratio | 0.2000 | 0.9000 | **failed** | no collapse |" in text
    assert "**No candidate passes.**" in markdown(decide({}, config))


def test_against_the_champion(scores, config):
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


def judged_by(scores: Scores, weights: str = "", **facts: str) -> Scores:
    """The same scores, with a proof that says what the judge `heldout` was."""
    inputs = {"judge heldout": weights} if weights else {}
    return replace(scores, proof={"config": {"judges": {"heldout": facts}, "diversity_judge": "heldout"}, "inputs": inputs})


HPS = {"kind": "hpsv2", "version": "2.0", "path": "HPS.pt"}
UNLIKE = [
    ({**HPS, "version": "2.1"}, r"scores of another version \('2\.1' against '2\.0'\) and cannot be compared"),
    ({**HPS, "kind": "clip"}, r"scores of another kind \('clip' against 'hpsv2'\)"),
    ({**HPS, "weights": "ff"}, "scores of another weights and cannot be compared"),
]


@pytest.mark.parametrize(("ours", "why"), UNLIKE)
def test_scores_of_another_judge_are_not_compared(scores, config, ours, why):
    scores["base"] = judged_by(scores["base"], **{"weights": "ee", **HPS})
    scores["balanced"] = judged_by(scores["balanced"], **{"weights": "ee", **ours})
    scores["aesthetic"] = judged_by(scores["aesthetic"], **{"weights": "ee", **HPS})
    record = decide(scores, config)
    assert record["winner"] == "aesthetic" and not record["candidates"]["balanced"]["passed"]
    of_heldout = [rule for rule in record["candidates"]["balanced"]["rules"] if rule["judge"] in ("heldout", "diversity")]
    assert of_heldout and all(not rule["passed"] and re.search(why, rule["why"]) for rule in of_heldout)


@pytest.mark.parametrize(("ours", "why"), UNLIKE)
def test_nor_with_a_champion_of_another_judge(scores, config, ours, why):
    margins = config.gate.model_copy(update={"champion_margin": {"heldout": 10.0}})
    config = config.model_copy(update={"gate": margins})
    champion = judged_by(scores["aesthetic"], **{"weights": "ee", **HPS})
    (rule,) = against_champion(judged_by(scores["balanced"], **{"weights": "ee", **HPS}), champion, config)
    assert rule["passed"]
    (rule,) = against_champion(judged_by(scores["balanced"], **{"weights": "ee", **ours}), champion, config)
    assert not rule["passed"] and rule["value"] is None and re.search(why, rule["why"])


def test_judges_without_local_weights_are_told_apart_by_their_hub_id(scores):
    ours, theirs = judged_by(scores["balanced"], path="a/one"), judged_by(scores["base"], path="a/two")
    assert "another path ('a/one' against 'a/two')" in (ours.unlike(theirs, "heldout") or "")
    assert ours.unlike(judged_by(scores["base"], weights="ee", path="b"), "heldout") is None  # the same may lie elsewhere
