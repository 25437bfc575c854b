"""What a table of scores was made from: settings, files, and the weights of the judges and of what was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textcraftor.artifact import proof
from textcraftor.candidate import Candidate
from textcraftor.config import MATRIX, ORACLE_JUDGES, Config, Section
from textcraftor.evaluate.scores import ORACLE
from textcraftor.heldout import Fingerprint, fingerprint, same_weights
from textcraftor.layout import HELDOUT_PROMPTS


def comparable_settings(config: Config) -> dict[str, Any]:
    """The settings that must be equal for two candidates' scores to be comparable."""
    judges: dict[str, Any] = {
        name: ORACLE if name in ORACLE_JUDGES else config.rewards[name.removesuffix(MATRIX)].model_dump(mode="json")
        for name in (*config.evaluate.judges, config.evaluate.diversity_judge)
    }
    return {
        "base": config.base.model_dump(mode="json"),
        "chain": config.chain.model_dump(mode="json"),
        "sampler": config.sampler.model_dump(mode="json"),
        "judges": dict(sorted(judges.items())),
        "diversity_judge": config.evaluate.diversity_judge,
    }


def scores_proof(config: Config, model: Candidate, root: Path) -> dict[str, Any]:
    """The proof of a table of scores. Weights that are not on this machine are named by the configuration alone."""
    settings = comparable_settings(config)
    judges = {name: config.rewards[name.removesuffix(MATRIX)] for name in settings["judges"] if name not in ORACLE_JUDGES}
    models: dict[str, Section] = {"base": config.base, **{f"judge {name}": reward for name, reward in judges.items()}}
    paths = {"prompts": root / HELDOUT_PROMPTS, **model.parts}
    for label, section in models.items():
        for field, path in section.at(root).own_files().items():
            paths[label if field == "path" else f"{label} {field}"] = Path(path)
    present = {name: path for name, path in paths.items() if path.exists()}
    return proof({**settings, "evaluate": config.evaluate}, present, config.evaluate.seed)


def weights_record(config: Config, model: Candidate, root: Path) -> dict[str, Any]:
    """{judge_weights, trained_weights}: fingerprints of the judges and of the rewards that the candidate was trained on.

    The gate compares the two.  trained_weights comes from the proofs of training; it is missing where one of them lacks it.
    """
    judges = (*config.evaluate.judges, config.evaluate.diversity_judge)
    names = dict.fromkeys(judge.removesuffix(MATRIX) for judge in judges if judge not in ORACLE_JUDGES)
    record: dict[str, Any] = {"judge_weights": {name: fingerprint(config.rewards[name].at(root)).as_json() for name in names}}
    trained: dict[str, Any] = {}
    for folder in dict.fromkeys(part.parent for part in model.parts.values()):
        try:
            trained |= json.loads((folder / "proof.json").read_text(encoding="utf-8"))["trained_weights"]
        except (OSError, ValueError, KeyError):
            return record
    return {**record, "trained_weights": trained}


def trained_on(config: Config, model: Candidate, proof: Mapping[str, Any]) -> tuple[str, ...]:
    """The rewards that the candidate was trained on, and the judges that have the weights of one of them.

    proof: what `weights_record` gave.  Without a record of training, the rewards of the mix by its name.
    """
    mix = config.mix.get(model.mix, {})
    names = set(proof.get("trained_weights", [name for name, weight in mix.items() if weight]))
    weights = {name: Fingerprint.from_json(each) for name, each in proof.get("trained_weights", {}).items()}
    judges = {name: Fingerprint.from_json(each) for name, each in proof["judge_weights"].items()}
    for judge in config.evaluate.judges:
        name = judge.removesuffix(MATRIX)
        if name in names or (name in judges and same_weights(judges[name], weights)):
            names.add(judge)
    return tuple(sorted(names))
