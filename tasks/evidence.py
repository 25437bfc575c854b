"""The evidence for a candidate: its files, its scores and the base's, and the signed statement about them.

Layout of a candidate's folder, in the registry and on disk after `fetch`:

    text_encoder/ (unless the UNet alone is tuned)  unet/ (when tuned)  grids/  MODEL_CARD.md  statement.dsse.json
    proof.json  history.csv  training.dsse.json  trained-on.parquet, those of a tuned UNet beginning with `unet-`
    blend.json     parts/ (of a blend, in place of the above)
    evidence/      gate.json (this candidate's record)  scores.parquet  base-scores.parquet, each with its signature
                   metrics.json  grid.png  report.html
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tasks.workspace import Workspace
from textcraftor import layout
from textcraftor.artifact import write_json
from textcraftor.candidate import UNET_PREFIX, is_unet_alone
from textcraftor.errors import ModelError, Unproven
from textcraftor.evaluate.scores import Scores
from textcraftor.signing import Keyring, Statement
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
from textcraftor.trust.verifier import judge

Record = dict[str, Any]


def assemble(name: str, record: Record, workspace: Workspace, folder: Path) -> None:
    """Copy a candidate of the workspace and all evidence for or against it into `folder`."""
    root = workspace.folder
    # The update of a LoRA, which is merged into the weights already, stays behind.
    tuned = root / layout.unet_folder(layout.mix_of(name))
    if layout.has_tuned_unet(name) and is_unet_alone(tuned):
        shutil.copytree(tuned / "grids", folder / "grids")
    else:
        shutil.copytree(root / layout.candidate_folder(name), folder, ignore=lambda *_: {"lora"})
    if layout.has_tuned_unet(name):
        shutil.copytree(tuned / "unet", folder / "unet")
        for path in tuned.glob("*.*"):
            shutil.copyfile(path, folder / f"{UNET_PREFIX}{path.name}")
    shutil.copytree(workspace.report(name), folder / "evidence")
    for source, target in (
        (layout.scores_file(name), SCORES),
        (layout.scores_signature(name), SCORES_SIGNATURE),
        (layout.scores_file(layout.BASE), BASE_SCORES),
        (layout.scores_signature(layout.BASE), BASE_SIGNATURE),
    ):
        if (root / source).is_file():
            shutil.copyfile(root / source, folder / target)
    write_json(folder / "evidence/gate.json", {"candidate": name, **record})


def certify(folder: Path, model: str, project: Path) -> Statement:
    """Judge an assembled candidate under the policy of the registered model, and sign for it.

    The files are complete now: a file that is added or changed later breaks the statement.
    Raises Unproven when it does not pass the policy, ConfigError when the model has none.
    """
    keyring, policy = Keyring(project), Policy.load(model, project)
    scores, record = judge(folder, files(folder), policy, keyring)
    if failed := [rule["rule"] for rule in record["rules"] if not rule["passed"]]:
        raise Unproven(f"{scores.candidate} does not pass the policy of {model} ({', '.join(failed)})")
    return make_statement(folder, model, policy, record, scores, keyring)


def identity(folder: Path) -> str:
    """Key of an assembled candidate: equal weights, scores and verdict mean the same version.

    Of the scores the values count, of the verdict each rule's name, value, bound and outcome. Wording, code revision,
    library versions, pictures and timings do not.  Raises ModelError when scores or verdict are missing or damaged.
    """
    table = Scores.read(folder / SCORES).table
    path = folder / "evidence/gate.json"
    try:
        record = json.loads(path.read_bytes())
        rules = [[rule[key] for key in ("rule", "value", "bound", "passed")] for rule in record["rules"]]
        passed = record["passed"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is no gate record. Run the pipeline again") from None
    facts = {
        "weights": weights_digest(files(folder)),
        "scores": {column: table[column].to_list() for column in sorted(table.columns)},
        "passed": passed,
        "rules": rules,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
