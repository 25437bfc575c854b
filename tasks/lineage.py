"""Where a candidate comes from, in MLflow's terms: source and revision as tags, prompts as datasets, a logged model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import polars as pl
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel
from prefect.runtime import flow_run

from tasks.workspace import Workspace
from textcraftor.artifact import code_revision, digest
from textcraftor.evaluate.scores import Scores
from textcraftor.layout import blend_of, candidate_folder, has_tuned_unet, mix_of, unet_folder
from textcraftor.training_proof import PROMPTS
from textcraftor.trust.statement import SCORES

HELDOUT: Final = "heldout prompts"
DIGEST: Final = 36  # characters, at most, of a dataset's digest in MLflow


def source_tags(name: str, workspace: Workspace, folder: Path) -> dict[str, str]:
    """What made a candidate: command, Git revision, DVC's digest of its files, the flow run. Its files lie in `folder`.

    The revision is that of the evaluation, which the proof in the scores names.
    """
    mix = mix_of(name)
    command = f"blend --save {blend}" if (blend := blend_of(name)) else f"train{'-unet' * has_tuned_unet(name)} --mix {mix}"
    made = unet_folder(mix) if has_tuned_unet(name) else candidate_folder(name)
    tags = {
        "mlflow.source.name": f"textcraftor {command}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": str(Scores.read(folder / SCORES).proof.get("code_revision") or code_revision()),
        "dvc.digest": _dvc_digest(workspace.folder / "dvc.lock", made.as_posix()),
        "prefect.flow_run": str(flow_run.id or ""),
    }
    return {key: value for key, value in tags.items() if value}


def datasets(folder: Path) -> list[DatasetInput]:
    """The prompts that a candidate was trained on, those of a blend once for each part, and those it was judged on.

    A digest is the beginning of the sha256 of `trained-on.parquet`, which the training signed, and of the ids in the scores.
    """
    found = []
    for path in sorted(folder.rglob(f"*{PROMPTS}")):
        about = {"prompts": pl.scan_parquet(path).select(pl.len()).collect().item()}
        found.append(_dataset("train prompts", digest(path), path.relative_to(folder).as_posix(), about, "training"))
    about = {"prompts": Scores.read(folder / SCORES).table["prompt_id"].n_unique()}
    return [*found, _dataset(HELDOUT, heldout_digest(folder), SCORES, about, "evaluation")]


def heldout_digest(folder: Path) -> str:
    """Digest of the prompts that a candidate was judged on, as MLflow keeps it."""
    ids = sorted(set(Scores.read(folder / SCORES).table["prompt_id"].to_list()))
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:DIGEST]


def log_model(mlflow: MlflowClient, experiment: str, run_id: str, name: str, tags: Mapping[str, str]) -> LoggedModel:
    """MLflow's entity for the candidate as a model, which metrics are tied to. Its files are the run's."""
    kept = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    kind = "unet" if has_tuned_unet(name) else "text-encoder"
    return mlflow.create_logged_model(experiment, name, run_id, tags=kept, model_type=kind)


def _dataset(name: str, sha256: str, file: str, about: Mapping[str, Any], context: str) -> DatasetInput:
    source = json.dumps({"uri": f"candidate/{file}"})
    dataset = Dataset(name, sha256[:DIGEST], "local", source, profile=json.dumps(about))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _dvc_digest(lock: Path, output: str) -> str:
    """DVC's digest of a stage's output; empty where dvc.lock does not name it."""
    return next((str(out.get("md5", "")) for out in _outputs(lock) if out.get("path") == output), "")


def _outputs(lock: Path) -> Iterator[Mapping[str, Any]]:
    if lock.is_file():
        for stage in (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}).values():
            yield from stage.get("outs", ())
