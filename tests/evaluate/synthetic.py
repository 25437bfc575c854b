"""Scores made from random numbers, for tests of what follows from scores: comparisons, the gate, the champion."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from textcraftor.config import Config, load
from textcraftor.evaluate.scores import Scores

PROMPTS, IMAGES = 40, 2
RULES = [
    {"judge": "oracle", "metric": "delta", "at_least": 0.05, "why": "claims hold more often"},
    {"judge": "oracle", "metric": "ci_low", "at_least": 0.0, "why": "not by chance"},
    {"judge": "heldout", "metric": "win_rate", "at_least": 0.5},
    {"judge": "heldout", "metric": "mean", "at_least": -1.0},
    {"judge": "diversity", "metric": "ratio", "at_least": 0.9, "why": "no collapse"},
]


def gate_config(folder: Path) -> Config:
    """The tiny profile with the rules above and a champion margin for the oracle alone."""
    params = {
        "mixes": ["balanced", "aesthetic"],
        "evaluate": {"judges": ["aesthetic", "heldout", "oracle"], "bootstrap": 300},
        "gate": {"rank_by": "heldout", "rules": RULES},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    config = load(folder / "params.yaml")
    return config.model_copy(update={"gate": config.gate.model_copy(update={"champion_margin": {"oracle": 0.02}})})


def weights(letter: str) -> dict[str, object]:
    """A made-up fingerprint of a model's weights."""
    return {"digest": letter * 64, "largest": [f"{letter}{number:015d}" for number in range(16)]}


PROOF = {"judge_weights": {"aesthetic": weights("a"), "heldout": weights("b")}, "trained_weights": {"clip": weights("c")}}


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
    return Scores(name, f"digest of {name}", ("aesthetic", "heldout", "oracle"), ("clip",), PROOF, table.with_columns(**noise))


def three_candidates() -> dict[str, Scores]:
    """The base and two candidates that pass; `aesthetic` has the better delta of the judge `heldout`."""
    return {
        "base": scored("base"),
        "balanced": scored("balanced", oracle=0.2, heldout=0.1, seed=1),
        "aesthetic": scored("aesthetic", oracle=0.1, heldout=0.3, seed=2),
    }


def judged_by(scores: Scores, weights: str = "", **facts: str) -> Scores:
    """The same scores with a proof that describes the judge `heldout`."""
    inputs = {"judge heldout": weights} if weights else {}
    config = {"judges": {"heldout": facts}, "diversity_judge": "heldout"}
    return replace(scores, proof={**scores.proof, "config": config, "inputs": inputs})


CHAIN_FACTS = {
    "base": {"path": "data/tiny/base", "resolution": 64},
    "chain": {"scheduler": "ddim", "num_inference_steps": 25, "guidance_scale": 7.5},
    "sampler": {"switch_at": 0.4},
}


def made_with(scores: Scores, base_weights: str = "aa", **changes: dict[str, object]) -> Scores:
    """The same scores, with a proof that says which base and chain generated the images."""
    config = {name: {**section, **changes.get(name, {})} for name, section in CHAIN_FACTS.items()}
    return replace(scores, proof={**scores.proof, "config": config, "inputs": {"base": base_weights}})
