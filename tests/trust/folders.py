"""A candidate's folder as the registry holds it, signed for, and a project with its key and policy. No torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from textcraftor import training_proof
from textcraftor.artifact import digest
from textcraftor.config import GateConfig, GateRule
from textcraftor.evaluate.gate import judge_candidate
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import KIND, SUBJECT
from textcraftor.layout import BASE
from textcraftor.prompts.table import prompt_id
from textcraftor.signing import Keyring, Statement, sign
from textcraftor.trust.policy import Policy
from textcraftor.trust.statement import (
    BASE_SCORES,
    BASE_SIGNATURE,
    SCORES,
    SCORES_SIGNATURE,
    files,
    make_statement,
    weights_digest,
)

MODEL = "toy-model"
PROMPTS, IMAGES = 40, 2
POLICY = Policy(
    gate=GateConfig(
        rules=(
            GateRule(judge="oracle", metric="delta", at_least=0.05),
            GateRule(judge="heldout", metric="ci_low", at_least=0.0),
            GateRule(judge="diversity", metric="ratio", at_least=0.9),
        ),
        rank_by="heldout",
    ),
    judges={"oracle": "", "heldout": "b" * 64},
    diversity_judge="d" * 64,
    heldout_judges=("heldout",),
    images_per_prompt=IMAGES,
    bootstrap=200,
    seed=0,
)

JUDGES = {"heldout": {"digest": "b" * 64, "largest": []}, "layout": {"digest": "d" * 64, "largest": []}}
TRAINED_ON = ["another prompt", "one more"]


def make_scores(name: str, weights: str, gain: float, prompts: int = PROMPTS) -> Scores:
    """A candidate's scores: the base's plus `gain`."""
    rows = np.arange(prompts * IMAGES)
    noise = np.random.default_rng(0).normal(0, 0.05, len(rows))
    table = pl.DataFrame(
        {
            "prompt_id": [prompt_id(f"prompt {row // IMAGES}") for row in rows],
            "prompt": [f"prompt {row // IMAGES}" for row in rows],
            "seed": rows,
            "image_index": rows % IMAGES,
            "oracle": 0.5 + noise + gain,
            "heldout": 0.5 + noise + gain,
            "diversity": 0.5,
        }
    )
    proof = {
        "config": {"diversity_judge": "layout"},
        "judge_weights": JUDGES,
        "trained_weights": {"clip": {"digest": "c" * 64, "largest": []}},
    }
    return Scores(name, weights, ("oracle", "heldout"), ("clip",), proof, table)


def put_scores(scores: Scores, folder: Path, ring: Keyring, base: bool = False) -> None:
    """Write scores and their signature where a candidate's folder has them."""
    path, signature = (folder / each for each in ((BASE_SCORES, BASE_SIGNATURE) if base else (SCORES, SCORES_SIGNATURE)))
    scores.write(path)
    about = {"candidate": scores.candidate, "digest": scores.digest}
    signature.write_bytes(sign(Statement(KIND, {SUBJECT: digest(path)}, about), ring.signer()))


def make_candidate(
    folder: Path,
    project: Path,
    gain: float = 0.2,
    policy: Policy = POLICY,
    attack: Callable[[Path, Keyring], object] | None = None,
    **changes: object,
) -> Path:
    """A candidate with a signed statement.  attack: changes the folder before it is judged.  changes: of its scores."""
    encoder = folder / "text_encoder"
    (folder / "evidence").mkdir(parents=True)
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    (encoder / "model.safetensors").write_bytes(b"tuned weights")
    (folder / "proof.json").write_text("{}")
    (folder / "evidence/gate.json").write_text(json.dumps({"passed": True}))
    ring = Keyring(project, {})
    trained_weights = changes.get("proof", make_scores("balanced", "", gain).proof).get("trained_weights", {})  # type: ignore[attr-defined]
    training_proof.write(folder, ["text_encoder"], TRAINED_ON, trained_weights, ring)
    if attack:
        attack(folder, ring)
    scores = replace(make_scores("balanced", weights_digest(files(folder)), gain), **changes)  # type: ignore[arg-type]
    base = make_scores(BASE, "base", 0.0, scores.table["prompt_id"].n_unique())
    put_scores(scores, folder, ring)
    put_scores(base, folder, ring, base=True)
    make_statement(folder, MODEL, policy, judge_candidate("balanced", scores, base, policy), scores, ring)
    return folder


def make_project(root: Path, policy: Policy = POLICY) -> Path:
    """A project with a pinned policy."""
    policy.write(MODEL, "toy", root)
    return root
