"""Scores are compared only when the same judges saw images of the same base and chain."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate.synthetic import gate_config, judged_by, made_with, scored, three_candidates
from textcraftor.config import Config
from textcraftor.evaluate.gate import against_champion, decide
from textcraftor.evaluate.scores import Scores


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return gate_config(tmp_path)


@pytest.fixture
def scores() -> dict[str, Scores]:
    return three_candidates()


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
    rules = [rule for rule in record["candidates"]["balanced"]["rules"] if rule["metric"] != "held_out"]
    of_heldout = [rule for rule in rules if rule["judge"] in ("heldout", "diversity")]
    assert of_heldout and all(not rule["passed"] and re.search(why, rule["why"]) for rule in of_heldout)


@pytest.mark.parametrize(("ours", "why"), UNLIKE)
def test_a_champion_scored_by_another_judge_is_not_compared(scores, config, ours, why):
    margins = config.gate.model_copy(update={"champion_margin": {"heldout": 10.0}})
    config = config.model_copy(update={"gate": margins})
    champion = judged_by(scores["aesthetic"], **{"weights": "ee", **HPS})
    (rule,) = against_champion(judged_by(scores["balanced"], **{"weights": "ee", **HPS}), champion, config)
    assert rule["passed"]
    (rule,) = against_champion(judged_by(scores["balanced"], **{"weights": "ee", **ours}), champion, config)
    assert not rule["passed"] and rule["value"] is None and re.search(why, rule["why"])


def test_judges_without_local_weights_are_distinguished_by_their_hub_id(scores):
    ours, theirs = judged_by(scores["balanced"], path="a/one"), judged_by(scores["base"], path="a/two")
    assert "another path ('a/one' against 'a/two')" in (ours.judge_difference(theirs, "heldout") or "")
    here, there = (judged_by(scores[name], weights="ee", path=name) for name in ("balanced", "base"))
    assert here.judge_difference(there, "heldout") is None  # the same weights in two places


OTHER_CHAINS = [
    ({"chain": {"guidance_scale": 9.0}}, "chain.guidance_scale (9.0 against 7.5)"),
    ({"sampler": {"switch_at": 0.6}}, "sampler.switch_at (0.6 against 0.4)"),
    ({"base": {"resolution": 128}}, "base.resolution (128 against 64)"),
    ({"base_weights": "bb"}, "base.weights"),
]


@pytest.mark.parametrize(("changes", "difference"), OTHER_CHAINS)
def test_scores_of_another_base_or_chain_are_not_compared(scores, config, changes, difference):
    scores = {name: made_with(each) for name, each in scores.items()}
    scores["aesthetic"] = made_with(scores["aesthetic"], **changes)
    record = decide(scores, config)
    assert record["winner"] == "balanced"
    rules = [rule for rule in record["candidates"]["aesthetic"]["rules"] if rule["metric"] != "held_out"]
    assert not any(rule["passed"] for rule in rules)
    assert all(difference in rule["why"] for rule in rules)


@pytest.mark.parametrize(("changes", "difference"), OTHER_CHAINS)
def test_a_champion_of_another_base_or_chain_is_not_compared(scores, config, changes, difference):
    champion = made_with(scores["balanced"])
    same = made_with(scored("new", oracle=0.3, seed=3))
    assert [rule["passed"] for rule in against_champion(same, champion, config)] == [True]
    (rule,) = against_champion(made_with(same, **changes), champion, config)
    assert not rule["passed"] and rule["value"] is None and difference in rule["why"]


def test_path_of_the_base_and_memory_settings_are_no_difference(scores):
    ours = made_with(scores["balanced"], base={"path": "elsewhere/base", "vae_slicing": True, "tiny_vae": None})
    assert ours.chain_difference(made_with(scores["base"])) is None


def test_a_proof_without_a_chain_is_not_compared_with_one_that_has_it(scores):
    assert "chain" in (scores["balanced"].chain_difference(made_with(scores["base"])) or "")


def test_judges_of_which_only_one_has_known_weights_are_not_compared(scores):
    ours, theirs = judged_by(scores["balanced"], **{**HPS, "weights": "ee"}), judged_by(scores["base"], **HPS)
    assert "another weights" in (ours.judge_difference(theirs, "heldout") or "")


TWO_DIFFERENCES = """
from tests.evaluate.synthetic import judged_by, scored
ours = judged_by(scored("new"), weights="ff", kind="clip", version="2.1", path="a")
theirs = judged_by(scored("base"), weights="ee", kind="hpsv2", version="2.0", path="b")
print(ours.judge_difference(theirs, "heldout"))
"""


def test_the_reason_does_not_depend_on_the_hash_seed():
    """gate.json holds the reason, and sets of strings are iterated in another order in every process."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_DIFFERENCES],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},  # these two disagree on {"kind", "version", "weights"}
        )
        for seed in ("0", "1")
    ]
    reasons = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert reasons[0] == reasons[1]
