"""The one verifier: whether a candidate's folder proves that it may go live. Nothing in it is trusted but the signatures.

Register, promote, serve and `generate` call it and nothing else. It reads every file once, and judges the two tables of
scores again under the policy that is pinned now.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from securesystemslib.signer import Key

from textcraftor import training_proof
from textcraftor.config import MATRIX
from textcraftor.errors import Unproven
from textcraftor.evaluate.gate import judge_candidate
from textcraftor.evaluate.scores import Scores
from textcraftor.evaluate.signed_scores import read_signed
from textcraftor.layout import BASE
from textcraftor.prompts.table import prompt_id
from textcraftor.signing import Keyring, Statement, open_envelope
from textcraftor.trust import statement as statements
from textcraftor.trust.policy import Policy


@dataclass(frozen=True)
class Proven:
    """A candidate that may go live.

    statement: what was signed.  digest: sha256 of the signed statement's file.  record: the verdict, computed just now.
    """

    folder: Path
    statement: Statement
    digest: str
    record: dict[str, Any]
    scores: Scores


def verify(folder: Path, model: str, root: Path) -> Proven:
    """Verify a candidate's folder for the registered model, with the keys and the policy of the project at `root`.

    Raises Unproven with the first reason that is found, ConfigError when the model has no policy.
    """
    keyring = Keyring(root)
    path = folder / statements.STATEMENT
    if not path.is_file():
        raise Unproven("it has no signed statement. Only what passed the gate can be used or promoted")
    content = path.read_bytes()
    statement = open_envelope(content, statements.KIND, keyring.believed())
    found = statements.files(folder)
    if found != dict(statement.subject):
        differing = sorted(name for name in {*found, *statement.subject} if found.get(name) != statement.subject.get(name))
        raise Unproven(f"its files are not the ones that were signed: {', '.join(differing[:3])}")
    if statement.predicate.get("registered_model") != model:
        raise Unproven(f"it was judged for {statement.predicate.get('registered_model')!r}, not for {model!r}")
    scores, record = judge(folder, found, Policy.load(model, root), keyring)
    if failed := [rule["rule"] for rule in record["rules"] if not rule["passed"]]:
        raise Unproven(f"{scores.candidate} does not pass the policy of {model} ({', '.join(failed)})")
    return Proven(folder, statement, hashlib.sha256(content).hexdigest(), record, scores)


def judge(folder: Path, files: dict[str, str], policy: Policy, keyring: Keyring) -> tuple[Scores, dict[str, Any]]:
    """The candidate's scores in its folder, and its gate record under a policy.

    files: name and sha256 of the folder's files.  Raises Unproven when the scores of the candidate or of the base are not
    signed, are about other weights, were given by other judges than the policy's, or on prompts that were trained on.
    """
    keys = keyring.believed()
    read = {}
    for table, signature in (
        (statements.SCORES, statements.SCORES_SIGNATURE),
        (statements.BASE_SCORES, statements.BASE_SIGNATURE),
    ):
        read[table], digest = read_signed(folder / table, folder / signature, keys)
        if digest != files.get(table):
            raise Unproven(f"{table} changed while it was read")
    scores, base = read[statements.SCORES], read[statements.BASE_SCORES]
    weights = statements.weights_digest(files)
    if scores.digest != weights:
        raise Unproven(f"its weights have digest {weights[:12]}, its scores are about {scores.digest[:12]}")
    if base.candidate != BASE:
        raise Unproven(f"the scores that it is compared with are of {base.candidate}, not of the base")
    _require_judges(scores, policy)
    _require_held_out_prompts(folder, files, scores, keys)
    return scores, judge_candidate(scores.candidate, scores, base, policy)


def _require_judges(scores: Scores, policy: Policy) -> None:
    """The judges are the policy's, by their weights, and drew enough images of each prompt."""
    given = scores.proof.get("judge_weights", {})
    for judge, expected in policy.judges.items():
        found = given.get(judge.removesuffix(MATRIX), {}).get("digest", "")
        if expected and found != expected:
            raise Unproven(
                f"the judge {judge} has other weights ({found[:12] or 'unknown'}) than the policy names ({expected[:12]})"
            )
    measure = scores.proof.get("config", {}).get("diversity_judge", "")
    found = given.get(measure, {}).get("digest", "")
    if policy.diversity_judge and found != policy.diversity_judge:
        raise Unproven(
            f"diversity was measured with other weights ({found[:12] or 'unknown'}) than the policy names "
            f"({policy.diversity_judge[:12]})"
        )
    fewest = int(scores.table.group_by("prompt_id").len()["len"].min() or 0)  # type: ignore[arg-type]
    if fewest < policy.images_per_prompt:
        raise Unproven(f"a prompt has {fewest} images, the policy asks for {policy.images_per_prompt}")


def _require_held_out_prompts(folder: Path, files: Mapping[str, str], scores: Scores, keys: Mapping[str, Key]) -> None:
    """No prompt of the scores was trained on, and the scores hide no reward that was, by what the trainings signed."""
    asked = scores.table.select("prompt_id", "prompt").unique()
    for key, prompt in asked.iter_rows():
        if key != prompt_id(prompt):
            raise Unproven(f"its scores give the prompt {prompt!r} an id that is not its own")
    numbers = pl.Series([int(key, 16) for key in asked["prompt_id"]], dtype=pl.UInt64)
    recorded = scores.proof.get("trained_weights") or {}
    for trained in training_proof.read(folder, files, keys):
        if hidden := [name for name, weights in trained.weights.items() if recorded.get(name) != weights]:
            raise Unproven(f"it was trained on {hidden[0]}, and its scores do not say so. Evaluate it again")
        seen = asked["prompt"].filter(numbers.is_in(trained.prompts.implode()))
        if len(seen):
            raise Unproven(f"{len(seen)} of the prompts that it was judged on were trained on, such as {seen.min()!r}")
