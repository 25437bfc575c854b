"""What speaks for a candidate: its gate record, its scores and its bytes, and whether the three agree.

A candidate's folder, in the registry as on disk after `fetch`:

    text_encoder/  unet/ (when tuned)  proof.json  history.csv  grids/  MODEL_CARD.md
    evidence/      gate.json (this candidate's record)  scores.parquet  metrics.json  grid.png  report.html
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from tasks.workspace import Workspace
from textcraftor import layout
from textcraftor.artifact import digest, write_json
from textcraftor.errors import UserError

Record = dict[str, Any]


class Unproven(UserError):
    """A candidate whose bytes, scores and gate record do not belong together, or that did not pass."""


def model_digest(folder: Path) -> str:
    """The digest a gate record speaks of, from the weights in `folder` as they are now. Raises ModelError."""
    from textcraftor.candidate import Candidate

    return Candidate.find(str(folder), Path()).digest


def candidate_digest(name: str, workspace: Workspace) -> str:
    """The same for a candidate of a workspace, by name. Raises ModelError."""
    from textcraftor.candidate import Candidate

    return Candidate.find(name, workspace.folder).digest


def assemble(name: str, record: Record, workspace: Workspace, folder: Path) -> None:
    """Lay out a candidate of the workspace in `folder`, all that speaks for or against it included."""
    mix = layout.mix_of(name)
    shutil.copytree(workspace.folder / layout.encoder_folder(mix), folder)
    if layout.has_tuned_unet(name):
        tuned = workspace.folder / layout.unet_folder(mix)
        shutil.copytree(tuned / "unet", folder / "unet")
        for path in tuned.glob("*.*"):
            shutil.copyfile(path, folder / f"unet-{path.name}")
    evidence = folder / "evidence"
    shutil.copytree(workspace.report(name), evidence)
    shutil.copyfile(workspace.scores(name), evidence / "scores.parquet")
    write_json(evidence / "gate.json", {"candidate": name, **record})


def prove(folder: Path) -> Record:
    """The gate record of an assembled candidate, if it passed and everything there is about the same bytes.

    Raises Unproven otherwise. Nothing is taken on trust: the weights are digested anew.
    """
    path = folder / "evidence/gate.json"
    if not path.is_file():
        raise Unproven(f"{folder.name} carries no gate record. Only what the gate passed can be used or promoted")
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    failed = [rule["rule"] for rule in record["rules"] if not rule["passed"]]
    if not record["passed"] or failed or not record["rules"]:
        raise Unproven(f"{record['candidate']} did not pass the gate ({', '.join(failed) or 'no rule was checked'})")
    now = model_digest(folder)
    scored = json.loads(parquet.read_schema(folder / "evidence/scores.parquet").metadata[b"textcraftor"])["digest"]
    for what, other in (("gate record", record["digest"]), ("scores", scored)):
        if now != other:
            raise Unproven(
                f"{record['candidate']}: its weights have digest {now[:12]}, its {what} is about {other[:12]}. "
                "They do not belong together; run the pipeline again"
            )
    return record


def identity(folder: Path) -> str:
    """What an assembled candidate is: its weights, its scores and its verdict. The same thrice is the same version.

    Pictures, timings and wording do not count.
    """
    evidence = folder / "evidence"
    parts = [model_digest(folder), digest(evidence / "scores.parquet"), digest(evidence / "gate.json")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
