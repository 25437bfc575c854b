"""The one signed statement that speaks for a candidate, in `statement.dsse.json` of its folder.

Its subject is every file of the folder; its predicate says with what the candidate was judged and under which policy.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from textcraftor.artifact import code_revision, digest, folder_digest
from textcraftor.candidate import BLEND_FILE, BLEND_PARTS, PARTS, parts_digest
from textcraftor.errors import Unproven
from textcraftor.evaluate.scores import Scores
from textcraftor.signing import Keyring, Statement, sign
from textcraftor.trust.policy import Policy

STATEMENT: Final = "statement.dsse.json"
MLFLOW_NOTE: Final = "registered_model_meta"  # MLflow writes it into what it loads, in a local store into the store itself
KIND: Final = "urn:textcraftor:candidate:v1"
SCORES, SCORES_SIGNATURE = "evidence/scores.parquet", "evidence/scores.dsse.json"
BASE_SCORES, BASE_SIGNATURE = "evidence/base-scores.parquet", "evidence/base-scores.dsse.json"
_WITHIN = rf"(?:{BLEND_PARTS}/[\w-]+/)?"  # of a blend
_ALLOWED: Final = re.compile(
    rf"{_WITHIN}(?:{'|'.join(PARTS)})/(?:config\.json|[\w.-]+\.safetensors(?:\.index\.json)?)"
    rf"|{_WITHIN}(?:unet-)?(?:proof\.json|training\.dsse\.json|trained-on\.parquet|history\.csv|grids/[\w.-]+\.png)"
    rf"|{re.escape(BLEND_FILE)}|MODEL_CARD\.md|MLmodel"
    r"|evidence/[\w.-]+\.(?:json|parquet|png|html|md)"
)


def files(folder: Path) -> dict[str, str]:
    """Name and sha256 of every file in a candidate's folder but its statement and MLflow's note; each is read once.

    Raises Unproven for a link, a file of another kind, or an index of shards that leaves the folder.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise Unproven(f"{name} is a link or no plain file")
        if path.is_file() and name not in (STATEMENT, MLFLOW_NOTE):
            if not _ALLOWED.fullmatch(name):
                raise Unproven(f"{name} does not belong to a candidate")
            found[name] = digest(path)
            if name.endswith(".index.json"):
                _check_shards(path)
    return found


def weights_digest(subject: Mapping[str, str]) -> str:
    """The candidate's digest (`Candidate.digest`), from the files of its parts."""
    parts: dict[str, dict[str, str]] = {}
    blended = any(name.startswith(f"{BLEND_PARTS}/") for name in subject)
    for name, value in subject.items():
        part, _, rest = name.removeprefix(f"{BLEND_PARTS}/").partition("/")
        if blended and name.startswith(f"{BLEND_PARTS}/"):
            inner, _, rest = rest.partition("/")
            part = f"{part}/{inner}" if inner in PARTS else ""
        elif blended or part not in PARTS:
            part = ""
        if part:
            parts.setdefault(part, {})[rest] = value
    digests = {part: folder_digest(content) for part, content in parts.items()}
    return parts_digest({**digests, **({BLEND_FILE: subject.get(BLEND_FILE, "")} if blended else {})})


def make_statement(
    folder: Path, model: str, policy: Policy, record: Mapping[str, Any], scores: Scores, keyring: Keyring
) -> Statement:
    """Sign for the candidate in `folder`, and write the statement into it.

    model: the registered model.  record: the verdict under `policy`.  scores: the candidate's.
    """
    proof, table = scores.proof, scores.table
    prompts = table["prompt_id"].unique().sort().to_list()
    listed, signer = "\n".join(prompts).encode(), keyring.signer()
    statement = Statement(
        KIND,
        files(folder),
        {
            "candidate": scores.candidate,
            "digest": scores.digest,
            "registered_model": model,
            "policy": policy.digest,
            "generated_with": {name: proof.get("config", {}).get(name) for name in ("base", "chain", "sampler")},
            "inputs": proof.get("inputs", {}),
            "trained_weights": proof.get("trained_weights"),
            "prompts": {"count": len(prompts), "images": table.height, "sha256": hashlib.sha256(listed).hexdigest()},
            "rules": [{key: rule[key] for key in ("rule", "value", "bound", "passed")} for rule in record["rules"]],
            "code_revision": code_revision(),
        },
        signer.public_key.keyid,
    )
    (folder / STATEMENT).write_bytes(sign(statement, signer))
    return statement


def _check_shards(index: Path) -> None:
    try:
        shards = {Path(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unproven(f"{index.name} is no index of weights") from None
    if lost := sorted(shard for shard in shards if len(shard.parts) != 1 or not (index.parent / shard).is_file()):
        raise Unproven(f"{index.name} names weights that are not beside it: {lost[0]}")
