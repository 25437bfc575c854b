"""Scores with the signature of the evaluation that wrote them. Whoever edits the table afterwards cannot sign it again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from securesystemslib.signer import Key

from textcraftor.artifact import digest, written_aside
from textcraftor.errors import ModelError, Unproven
from textcraftor.evaluate.scores import Scores
from textcraftor.layout import scores_file, scores_signature
from textcraftor.signing import Keyring, Statement, open_envelope, sign

KIND: Final = "urn:textcraftor:scores:v1"
SUBJECT: Final = "scores.parquet"


def write_signed(scores: Scores, root: Path) -> None:
    """Write a candidate's scores and the signed statement about them into the workspace `root`."""
    path = root / scores_file(scores.candidate)
    scores.write(path)
    statement = Statement(KIND, {SUBJECT: digest(path)}, {"candidate": scores.candidate, "digest": scores.digest})
    with written_aside(root / scores_signature(scores.candidate)) as aside:
        aside.write_bytes(sign(statement, Keyring(root).signer()))


def read_signed(path: Path, signature: Path, keys: Mapping[str, Key]) -> tuple[Scores, str]:
    """The scores in a file and the sha256 of its bytes, which are read once.

    Raises Unproven when the file or its signature is missing or damaged, or when no key in `keys` signed these bytes.
    """
    for each in (path, signature):
        if not each.is_file():
            raise Unproven(f"{each.name} is missing")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    try:
        statement = open_envelope(signature.read_bytes(), KIND, keys)
    except Unproven as error:
        raise Unproven(f"{path.name}: {error}") from None
    if dict(statement.subject) != {SUBJECT: found}:
        raise Unproven(f"{path.name} was changed after it was signed")
    try:
        scores = Scores.parse(content, path)
    except ModelError as error:
        raise Unproven(str(error)) from None
    if (scores.candidate, scores.digest) != (statement.predicate.get("candidate"), statement.predicate.get("digest")):
        raise Unproven(f"{path.name}: its signature is about another candidate")
    return scores, found
