"""The evidence for a candidate: its gate record, its scores and its weights, and whether the three belong together.

Layout of a candidate's folder, in the registry and on disk after `fetch`:

    text_encoder/  unet/ (when tuned)  proof.json  history.csv  grids/  MODEL_CARD.md   (of a blend: blend.json  parts/)
    evidence/      gate.json (this candidate's record)  scores.parquet  metrics.json  grid.png  report.html
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from pydantic import BaseModel, ConfigDict

from tasks.workspace import Workspace
from textcraftor import layout
from textcraftor.artifact import digest, write_json
from textcraftor.candidate import Candidate
from textcraftor.errors import ModelError, UserError

Record = dict[str, Any]


class Unproven(UserError):
    """Weights, scores and gate record of a candidate are missing, damaged, do not match, or it did not pass the gate."""


class _Rule(BaseModel):
    """A rule of a gate record, as far as the verdict depends on it."""

    model_config = ConfigDict(strict=True)

    rule: str
    value: float | None
    bound: float | None
    passed: bool

    @property
    def holds(self) -> bool:
        """Whether the rule says that it passed and its figures agree."""
        known = self.value is not None and self.bound is not None and math.isfinite(self.value)
        return self.passed and known and self.value >= self.bound  # type: ignore[operator]


class _GateRecord(BaseModel):
    """gate.json of one candidate, as far as the verdict depends on it."""

    model_config = ConfigDict(strict=True)

    candidate: str
    digest: str
    passed: bool
    rules: list[_Rule]


class _ScoresMetadata(BaseModel):
    """Metadata of scores.parquet."""

    model_config = ConfigDict(strict=True)

    candidate: str
    digest: str
    judges: list[str]
    trained_on: list[str]
    proof: dict[str, Any]


def model_digest(folder: Path) -> str:
    """Digest of the weights in `folder` as they are now, as named in gate records. Raises ModelError."""
    return Candidate.find(str(folder), Path()).digest


def candidate_digest(name: str, workspace: Workspace) -> str:
    """Digest of the weights of a workspace's candidate, by name. Raises ModelError."""
    return Candidate.find(name, workspace.folder).digest


def assemble(name: str, record: Record, workspace: Workspace, folder: Path) -> None:
    """Copy a candidate of the workspace and all evidence for or against it into `folder`."""
    shutil.copytree(workspace.folder / layout.candidate_folder(name), folder)
    if layout.has_tuned_unet(name):
        tuned = workspace.folder / layout.unet_folder(layout.mix_of(name))
        shutil.copytree(tuned / "unet", folder / "unet")
        for path in tuned.glob("*.*"):
            shutil.copyfile(path, folder / f"unet-{path.name}")
    evidence = folder / "evidence"
    shutil.copytree(workspace.report(name), evidence)
    shutil.copyfile(workspace.scores(name), evidence / "scores.parquet")
    write_json(evidence / "gate.json", {"candidate": name, **record})


def prove(folder: Path) -> Record:
    """Check an assembled candidate and return its gate record.

    The weights are digested again; every rule must have passed with a value that reaches its bound.
    Raises Unproven when something is missing or damaged, did not pass, or is about other weights.
    """
    record = _read_record(folder)
    gate = _GateRecord.model_validate(record)
    failed = [rule.rule for rule in gate.rules if not rule.holds]
    if not gate.passed or failed or not gate.rules:
        raise Unproven(f"{gate.candidate} did not pass the gate ({', '.join(failed) or 'no rule was checked'})")
    try:
        weights = model_digest(folder)
    except (ModelError, FileNotFoundError) as error:
        raise Unproven(f"{gate.candidate}: its weights are gone ({error})") from None
    scores, _ = _read_scores(folder)
    for what, other in (("gate record", gate.digest), ("scores", scores.digest)):
        if weights != other:
            raise Unproven(
                f"{gate.candidate}: its weights have digest {weights[:12]}, its {what} is about {other[:12]}. "
                "They do not belong together; run the pipeline again"
            )
    return record


def identity(folder: Path) -> str:
    """Key of an assembled candidate: equal weights, scores and verdict mean the same version.

    Of the scores the values count, of the verdict each rule's name, value, bound and outcome. Wording, code revision,
    library versions, pictures and timings do not.
    """
    gate = _GateRecord.model_validate(_read_record(folder))
    _, table = _read_scores(folder)
    facts = {
        "weights": model_digest(folder),
        "scores": {column: table[column].to_pylist() for column in sorted(table.column_names)},
        "passed": gate.passed,
        "rules": [rule.model_dump() for rule in gate.rules],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def content_digest(folder: Path) -> str:
    """Digest of the bytes of weights, scores and gate record: shows whether stored evidence was changed later."""
    evidence = folder / "evidence"
    parts = [model_digest(folder), digest(evidence / "scores.parquet"), digest(evidence / "gate.json")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_record(folder: Path) -> Record:
    """The gate record of an assembled candidate. Raises Unproven when it is missing or damaged."""
    path = folder / "evidence/gate.json"
    if not path.is_file():
        raise Unproven(f"{folder.name} has no gate record. Only what passed the gate can be used or promoted")
    content = path.read_bytes()
    try:
        record: Record = json.loads(content)
        _GateRecord.model_validate(record)
    except ValueError as error:  # not UTF-8, not JSON, or not a gate record
        raise Unproven(f"its gate record is damaged ({_one_line(error)})") from None
    return record


def _read_scores(folder: Path) -> tuple[_ScoresMetadata, pyarrow.Table]:
    """The scores of an assembled candidate with their metadata. Raises Unproven when they are missing or damaged."""
    path = folder / "evidence/scores.parquet"
    if not path.is_file():
        raise Unproven("its scores are gone (evidence/scores.parquet)")
    content = path.read_bytes()
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        return _ScoresMetadata.model_validate_json((table.schema.metadata or {})[b"textcraftor"]), table
    except KeyError:
        raise Unproven("its scores are damaged (evidence/scores.parquet does not say what was scored)") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # pyarrow raises OSError for damaged bytes, too
        raise Unproven(f"its scores are damaged ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
