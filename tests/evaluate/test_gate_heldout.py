"""The gate holds the held-out judges' weights against those that the candidate was trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluate.synthetic import PROOF, gate_config, three_candidates, weights
from textcraftor.candidate import Candidate
from textcraftor.config import Config, load
from textcraftor.evaluate.gate import decide
from textcraftor.evaluate.provenance import trained_on, weights_record
from textcraftor.evaluate.scores import Scores
from textcraftor.heldout import require_held_out

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return gate_config(tmp_path)


@pytest.fixture
def scores() -> dict[str, Scores]:
    return three_candidates()


def trained_with(scores: Scores, trained: dict[str, object] | None) -> Scores:
    """The same scores of a candidate that was trained on these weights; None: its proof does not say on which."""
    proof = {**PROOF, "trained_weights": trained}
    return replace(scores, proof=proof if trained is not None else {"judge_weights": PROOF["judge_weights"]})


NEARLY = {**weights("b"), "digest": "f" * 64, "largest": [*weights("b")["largest"][:8], *weights("d")["largest"][:8]]}  # type: ignore[index]


@pytest.mark.parametrize(
    ("trained", "why"),
    [
        ({"heldout": weights("d")}, "aesthetic was trained on heldout"),
        ({"clip": weights("c"), "innocent": weights("b")}, "trained on innocent, which has the weights of heldout"),
        ({"innocent": NEARLY}, "trained on innocent, which has the weights of heldout"),
        (None, "the proof does not say which weights aesthetic was trained on"),
    ],
)
def test_a_candidate_trained_on_a_held_out_judge_fails_whatever_its_scores(scores, config, trained, why):
    scores["aesthetic"] = trained_with(scores["aesthetic"], trained)
    record = decide(scores, config)
    assert record["winner"] == "balanced"
    failed = {rule["rule"]: rule["why"] for rule in record["candidates"]["aesthetic"]["rules"] if not rule["passed"]}
    assert why in failed["heldout.held_out"]


def test_training_on_a_reward_named_oracle_fails(scores, config):
    scores["aesthetic"] = trained_with(scores["aesthetic"], {"oracle": weights("d")})
    rules = {rule["rule"]: rule for rule in decide(scores, config)["candidates"]["aesthetic"]["rules"]}
    assert rules["heldout.held_out"]["passed"] and not rules["oracle.held_out"]["passed"]


def test_the_record_names_the_held_out_judges_and_the_weights_of_both(scores, config):
    record = decide(scores, config)["candidates"]["balanced"]
    assert record["heldout_judges"] == {"heldout": weights("b"), "oracle": None}
    assert record["trained_weights"] == {"clip": weights("c")}


def test_scores_carry_the_weights_that_the_proof_of_training_names(tmp_path):
    config = load(ROOT / "params.yaml")
    (tmp_path / "encoder/text_encoder").mkdir(parents=True)
    candidate = Candidate("balanced", text_encoder=tmp_path / "encoder/text_encoder")
    trained = require_held_out(config, {"contrast": 1.0}, ROOT)
    (tmp_path / "encoder/proof.json").write_text(json.dumps({"trained_weights": trained}))
    record = weights_record(config, candidate, ROOT)
    assert record["trained_weights"] == trained and record["judge_weights"].keys() == {
        "aesthetic", "pickscore", "hpsv2", "clip", "heldout", "layout",
    }  # fmt: skip
    # The judge `clip` has the weights of the reward `contrast`, and is no independent witness either.
    assert trained_on(config, candidate, record) == ("clip", "contrast")
