"""A blend on disk: a candidate like any other, with what it is made of beside it."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from textcraftor import training_proof
from textcraftor.artifact import base_identity, digest, proof, write_json, written_aside
from textcraftor.candidate import BLEND_FILE, BLEND_PARTS, Candidate
from textcraftor.config import BlendConfig, Config, Weights
from textcraftor.errors import ModelError, Unproven
from textcraftor.layout import blend_folder
from textcraftor.models.base import load_base
from textcraftor.models.blended import load_blend, merge
from textcraftor.models.saving import save_module
from textcraftor.signing import Keyring


def save_blend(name: str, blend: BlendConfig, parts: Mapping[str, Candidate], run: Config, root: Path) -> Path:
    """Write data/blends/NAME, whose parts are copies, so that it can be moved, registered and proven; returns the folder.

    parts: candidates by their names in the weights.  In space `weights`, the encoders are merged into one.
    Raises ModelError for a part that does not fit the base, or cannot be blended so.
    """
    weights, out = Weights.of(blend.weights), root / blend_folder(name)
    effective = Weights(tuple(term for term in weights.terms if term.weight))
    used = {part: parts[part] for part in sorted(parts.keys() & effective.names)}
    if not used:
        raise ModelError(f"The blend {weights} is the base itself. Give a tuned encoder a weight")
    base = load_base(run.base.at(root), torch.device("cpu"))
    record = {
        "space": blend.space,
        "weights": [str(term) for term in effective.terms],
        "parts": {part: {"digest": candidate.digest} for part, candidate in used.items()},
    }
    inputs = {f"{part}/{module}": path for part, candidate in used.items() for module, path in candidate.parts.items()}
    about = {
        **proof({"base": run.base, "blend": record}, inputs, seed=0),
        "models": {"base": base_identity(run.base, root)},
        **_trained_weights(used.values()),
    }
    merged: dict[str, Any] = {}
    if blend.space == "weights":
        merged = merge(used, effective, base)
    else:
        load_blend(used, effective, base)  # raises where a part does not fit
    with written_aside(out) as aside:
        aside.mkdir()
        for name, module in merged.items():
            save_module(module, aside / name)
        for part, candidate in used.items() if not merged else ():
            for name, path in candidate.parts.items():
                shutil.copytree(path, aside / BLEND_PARTS / part / name)
                for file in (training_proof.PROOF, training_proof.STATEMENT, training_proof.PROMPTS):
                    if (origin := path.parent / file).is_file():
                        shutil.copyfile(origin, aside / BLEND_PARTS / part / file)
        write_json(aside / BLEND_FILE, record)
        write_json(aside / "proof.json", {**about, "weights": digest(aside)})
        if merged:
            _sign_merged(aside, merged, used.values(), Keyring(root))
    return out


def _sign_merged(folder: Path, modules: Iterable[str], candidates: Iterable[Candidate], keyring: Keyring) -> None:
    """Sign that merged weights were trained on what their parts were; nothing where one of them is not signed."""
    try:
        trained = [each for candidate in candidates for each in training_proof.of_candidate(candidate, keyring.believed())]
    except Unproven:
        return
    training_proof.write(folder, modules, (), {}, keyring, trained)


def _trained_weights(candidates: Iterable[Candidate]) -> dict[str, Any]:
    """{trained_weights} of all parts together; nothing where one of them does not say what it was trained on."""
    found: dict[str, Any] = {}
    for candidate in candidates:
        for folder in dict.fromkeys(path.parent for path in candidate.parts.values()):
            try:
                found |= json.loads((folder / "proof.json").read_text(encoding="utf-8"))["trained_weights"]
            except (OSError, ValueError, KeyError):
                return {}
    return {"trained_weights": found}
