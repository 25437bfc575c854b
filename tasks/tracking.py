"""One MLflow run for each candidate: parameters, metrics, training history, pictures, and the candidate's files.

Runs are found by `evidence.identity`, so a stage that DVC skipped adds no run.
"""

import csv
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import PIL.Image
import requests
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import lineage, stage_times, store
from tasks.evidence import Record, assemble, certify, identity
from tasks.links import evidence_file, report_page
from tasks.store import ARTIFACT, RegistryUnavailable, client, scratch, tracking_uri, without_credentials
from tasks.workspace import Workspace
from textcraftor.candidate import Candidate, is_unet_alone
from textcraftor.config import Config, Weights
from textcraftor.errors import ConfigError, Unproven
from textcraftor.evaluate.figures import claim_rows, headline, losses, plain_table, read_claims, rule_rows, score_rows
from textcraftor.layout import blend_of, has_tuned_unet, mix_of, unet_folder

CARD = Path(__file__).resolve().parents[1] / "mlflow/model_card.md.j2"
BATCH = 500  # metrics a request


def only_if_unavailable(task: Any, task_run: Any, state: Any) -> bool:
    """Retry a connection that failed and a database that was locked; MLflow's refusals stay refusals."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, MlflowException):
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or "API request to" in str(error)
    return isinstance(error, RegistryUnavailable | requests.ConnectionError | requests.Timeout)


@task(retries=3, retry_delay_seconds=5, retry_condition_fn=only_if_unavailable, cache_policy=NO_CACHE)
def open_history(config: Config) -> str:
    """ID of the experiment that candidates will be logged to, before any work that would be lost without it.

    It is created, or restored if somebody deleted it in the UI. Raises RegistryUnavailable when MLflow cannot be reached.
    """
    try:
        mlflow = client()
        mlflow.search_registered_models(max_results=1)
        return _experiment(mlflow, config.registry.name)
    except (MlflowException, requests.RequestException, OSError) as error:
        reason = without_credentials(" ".join(str(error).split())[:300])
        raise RegistryUnavailable(
            f"MLflow at {without_credentials(tracking_uri())} cannot take this run: {reason}. Nothing was started"
        ) from error


@dataclass(frozen=True)
class Tracked:
    """A candidate's run in MLflow. `refused` says why it cannot become a version; empty when it can."""

    run_id: str
    refused: str = ""


@task(
    task_run_name="track {name}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def track(name: str, record: Record, workspace: Workspace) -> Tracked:
    """Log an evaluated candidate, whether it passed or not. Equal identity means the same run.

    One that passed the run's gate and the policy of the registered model gets a signed statement, and may become a version.
    """
    mlflow, model = client(), workspace.config.registry.name
    with scratch() as empty:
        folder = empty / ARTIFACT
        assemble(name, record, workspace, folder)
        key = identity(folder)
        (folder / "MODEL_CARD.md").write_text(model_card(name, record, workspace), encoding="utf-8")
        write_mlmodel(folder)
        certificate = _certify(folder, name, record, model)
        experiment = _experiment(mlflow, model)
        for run in mlflow.search_runs([experiment], f"tags.identity = '{key}' and attributes.status = 'FINISHED'"):
            same = {name: run.data.tags.get(name) for name in certificate} == certificate
            if same and _is_complete(mlflow, run.info.run_id, folder):
                return Tracked(str(run.info.run_id), certificate["refused"])
        for run in mlflow.search_runs([experiment], f"tags.identity = '{key}' and attributes.status = 'RUNNING'"):
            mlflow.set_terminated(run.info.run_id, "KILLED")  # its process is gone; one that is alive says so when it ends
        tags = {**candidate_tags(name, record, workspace), "identity": key, **certificate}
        tags |= lineage.source_tags(name, workspace, folder)
        started, ended = (
            int(1000 * moment) for moment in stage_times.span(workspace.folder, name) or (time.time(), time.time())
        )
        run = mlflow.create_run(experiment, started, tags, name)
        run_id, logged = str(run.info.run_id), None
        try:
            picture = evidence_file(run_id, "grid.png")
            card = model_card(name, record, workspace, picture, report_page(experiment, run_id))
            mlflow.set_tag(run_id, "mlflow.note.content", card)
            logged = lineage.log_model(mlflow, experiment, run_id, name, tags)
            _log(mlflow, run_id, logged.model_id, name, workspace, folder, ended)
            mlflow.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
            mlflow.finalize_logged_model(logged.model_id, "READY")
        except BaseException:
            mlflow.set_terminated(run_id, "FAILED")
            if logged:
                mlflow.finalize_logged_model(logged.model_id, "FAILED")
            raise
        mlflow.set_terminated(run_id, "FINISHED", ended)
        return Tracked(run_id, certificate["refused"])


def _certify(folder: Path, name: str, record: Record, model: str) -> dict[str, str]:
    """Sign for the candidate in `folder` if it passes. Tags: policy and key of its statement, or why it was refused one."""
    if not record["passed"]:
        return {"policy": "", "signed_by": "", "refused": f"{name} did not pass the gate"}
    try:
        statement = certify(folder, model, store.ROOT)
    except (Unproven, ConfigError) as error:
        return {"policy": "", "signed_by": "", "refused": " ".join(str(error).split())}
    return {"policy": str(statement.predicate["policy"]), "signed_by": statement.signer, "refused": ""}


def write_mlmodel(folder: Path) -> None:
    """Write MLflow's MLmodel file: `mlflow.pyfunc.load_model` and `mlflow models serve` load the candidate by our library.

    No code of the artifact store runs: the file names a module of the library, which verifies the folder first.
    """
    flavor = {"loader_module": "textcraftor.serving", "python_version": platform.python_version()}
    params = ParamSchema(
        [ParamSpec("seed", "long", 0), ParamSpec("steps", "long", None), ParamSpec("guidance", "double", None)]
    )
    params = ParamSchema([*params.params, ParamSpec("strength", "double", 1.0)])
    signature = ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]), params)
    Model(flavors={"python_function": flavor}, signature=signature).save(str(folder / "MLmodel"))


def candidate_tags(name: str, record: Record, workspace: Workspace) -> dict[str, str]:
    """Tags of a candidate's run and version, to search by."""
    blend = _blend(name, workspace.config)
    return {
        "candidate": name,
        **({"blend": blend} if blend else {"mix": mix_of(name)}),
        "profile": workspace.config.profile,
        "digest": record["digest"],
        "gate": "passed" if record["passed"] else "failed",
        "validation_status": "passed" if record["passed"] else "failed",  # MLflow's own word for it
        "worse": losses(workspace.metrics(name), read_claims(name, workspace.folder)),
    }


def model_card(
    name: str,
    record: Record,
    workspace: Workspace,
    picture: str = "evidence/grid.png",
    report: str = "evidence/report.html",
) -> str:
    """The candidate's model card in markdown, from mlflow/model_card.md.j2.

    picture, report: their addresses; by default those beside MODEL_CARD.md.  Tables are text in a fixed-width font, because
    MLflow's page shows Markdown's tables without space between the columns.
    """
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined, trim_blocks=True)
    metrics, claims = workspace.metrics(name), read_claims(name, workspace.folder)
    return template.render(
        name=name,
        record=record,
        metrics=metrics,
        config=workspace.config,
        mix=mix_of(name),
        unet_alone=has_tuned_unet(name) and is_unet_alone(workspace.folder / unet_folder(mix_of(name))),
        blend=_blend(name, workspace.config),
        headline=headline(metrics, claims),
        losses=losses(metrics, claims),
        scores=plain_table(score_rows(metrics)),
        claims=plain_table(claim_rows(claims)) if claims else "",
        rules=plain_table(rule_rows(record["rules"])),
        picture=picture,
        report=report,
    )


def _log(mlflow: MlflowClient, run_id: str, model_id: str, name: str, workspace: Workspace, folder: Path, now: int) -> None:
    """Log parameters, data, figures, pictures and files. The figures belong to the logged model and the held-out prompts.

    now: when the candidate's work ended, in milliseconds since 1970.
    """
    config = workspace.config
    sections = {
        "base": config.base,
        "chain": config.chain,
        "sampler": config.sampler,
        "train": config.train,
        "evaluate": config.evaluate,
    }
    if has_tuned_unet(name):
        sections["train_unet"] = config.train_unet
    made_of = {"blend": config.blend[blend].weights} if (blend := blend_of(name)) else {"mix": config.mix[mix_of(name)]}
    params = made_of | {section: model.model_dump(mode="json") for section, model in sections.items()}
    mlflow.log_inputs(run_id, lineage.datasets(folder))
    about = {"model_id": model_id, "dataset_name": lineage.HELDOUT, "dataset_digest": lineage.heldout_digest(folder)}
    metrics = [Metric(key, value, now, 0, **about) for key, value in _numbers(workspace.metrics(name))]
    for part, file in (("train", "history.csv"), ("train_unet", "unet-history.csv")):
        metrics += [Metric(f"{part}/{key}", value, now, step) for step, key, value in history(folder / file)]
    mlflow.log_batch(run_id, params=[Param(key, str(value)) for key, value in _leaves(params)], tags=[RunTag("name", name)])
    for start in range(0, len(metrics), BATCH):
        mlflow.log_batch(run_id, metrics=metrics[start : start + BATCH])
    for picture in sorted((folder / "grids").glob("*.png")):
        step = int((re.findall(r"\d+", picture.stem) or ["0"])[-1])
        with PIL.Image.open(picture) as image:
            mlflow.log_image(run_id, image, key="grid", step=step)
    mlflow.log_artifacts(run_id, str(folder), ARTIFACT)


def _blend(name: str, config: Config) -> str:
    """The weights of a candidate that is a blend, as they are written; empty for any other."""
    return str(Weights.of(config.blend[blend].weights)) if (blend := blend_of(name)) else ""


def _is_complete(mlflow: MlflowClient, run_id: str, folder: Path) -> bool:
    """Whether a run still has its evidence and weights of the same sizes as those in `folder`."""
    stored: dict[str, int | None] = {}
    folders = [ARTIFACT]
    while folders:
        for entry in mlflow.list_artifacts(run_id, folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                stored[str(PurePosixPath(entry.path).relative_to(ARTIFACT))] = entry.file_size
    weights = [
        path
        for part in Candidate.find(str(folder), Path()).parts.values()
        for path in (part, *part.rglob("*"))
        if path.is_file()
    ]
    return {"evidence/gate.json", "evidence/scores.parquet"} <= stored.keys() and all(
        stored.get(path.relative_to(folder).as_posix()) == path.stat().st_size for path in weights
    )


def history(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, column, value) of each filled cell of a training history; nothing when there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for column, value in row.items():
                if value:
                    yield step, column, float(value)


def _experiment(mlflow: MlflowClient, name: str) -> str:
    """ID of the experiment, created or restored where needed: a run cannot be created in a deleted one."""
    found = mlflow.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage == LifecycleStage.DELETED:
            mlflow.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    # A server decides where artifacts are stored; without one MLflow would put them into the current folder.
    local = None if tracking_uri().startswith("http") else (store.STORE / "artifacts").as_uri()
    return str(mlflow.create_experiment(name, artifact_location=local))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of each number in metrics.json; names such as `judges/oracle/delta` and `judges/diversity/ratio`."""
    groups = {"judges": {**metrics["judges"], "diversity": metrics["diversity"]}}
    for key, value in _leaves(groups):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key.replace(".", "/"), float(value)
