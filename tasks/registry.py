"""The MLflow registry: versions with their proof, and who is `challenger` and `champion`.

A version is immutable: weights, scores and verdict belong together. Whoever moves an alias, and however,
`fetch` and `promote` prove the version anew; an alias on an unproven version opens nothing.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from tasks.evidence import Record, Unproven, identity, prove
from tasks.tracking import ARTIFACT, ROOT, STORE, candidate_tags, client, only_if_unreachable, tracking_uri
from tasks.workspace import Workspace
from textcraftor.artifact import written_aside
from textcraftor.config import Config
from textcraftor.errors import ModelError
from textcraftor.layout import STATE

CHALLENGER, CHAMPION = "challenger", "champion"
MODELS = ROOT / STATE / "models"  # versions fetched before


class Decision(BaseModel):
    """How a run ended for its best candidate."""

    verdict: Literal["promoted", "champion stays", "challenger", "judged", "not promoted"]
    why: str
    candidate: str | None = None
    version: int | None = None
    digest: str | None = None
    folder: str = ""
    page: str | None = None


@task(
    task_run_name="register {name}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unreachable,
    cache_policy=NO_CACHE,
)
def register(name: str, run_id: str, record: Record, workspace: Workspace) -> int:
    """Make a tracked candidate that passed the gate a version of the registered model; returns its number.

    The same candidate is the same version, found by its identity. Raises Unproven for one that did not pass.
    """
    if not record["passed"]:
        raise Unproven(f"{name} did not pass the gate. Only what passed becomes a version")
    mlflow = client()
    model = workspace.config.registry.name
    run = mlflow.get_run(run_id)
    key = run.data.tags["identity"]
    if known := mlflow.search_model_versions(f"name = '{model}' and tags.identity = '{key}'"):
        return min(int(version.version) for version in known)
    _create_model(mlflow, model)
    version = mlflow.create_model_version(
        model,
        source=f"{run.info.artifact_uri}/{ARTIFACT}",
        run_id=run_id,
        tags={**candidate_tags(name, record, workspace), "identity": key},
        description=run.data.tags["mlflow.note.content"],
    )
    return int(version.version)


@task(
    task_run_name="challenge with version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unreachable,
    cache_policy=NO_CACHE,
)
def challenge(version: int, config: Config) -> Decision:
    """Give a proven version the alias `challenger`, unless the champion has the same weights. Raises Unproven."""
    mlflow, model = client(), config.registry.name
    record = prove(fetch(str(version), config))
    holder, champion = _champion(mlflow, config)
    if holder and champion and champion["digest"] == record["digest"]:
        why = f"version {holder.version} is the champion and has the same weights"
        return _decision("champion stays", why, int(holder.version), record, model)
    mlflow.set_registered_model_alias(model, CHALLENGER, str(version))
    why = f"a person decides: prefect deployment run promote/champion --param version={version}"
    return _decision("challenger", why, version, record, model)


@task(
    task_run_name="promote version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unreachable,
    cache_policy=NO_CACHE,
)
def promote(version: int, config: Config, by_hand: bool = False) -> Decision:
    """Make a version `champion` if it is proven and no worse than the champion there is.

    by_hand: a person decided; the comparison with the champion is recorded, but does not bind. The proof does.
    Raises Unproven when weights, scores and gate record of the version do not belong together or did not pass.
    """
    mlflow, model = client(), config.registry.name
    record = prove(fetch(str(version), config))
    holder, champion = _champion(mlflow, config)
    if holder and champion and int(holder.version) == version:
        return _decision("champion stays", f"version {version} is the champion", version, record, model)
    rules = _against(version, int(holder.version), config) if holder and champion else []
    mlflow.set_model_version_tag(model, str(version), "against_champion", json.dumps(rules))
    failed = [f"{rule['rule']}: {rule['why']}" for rule in rules if not rule["passed"]]
    if holder and failed and not by_hand:
        why = f"the champion, version {holder.version}, stands. {'; '.join(failed)}"
        return _decision("not promoted", why, version, record, model)
    mlflow.set_registered_model_alias(model, CHAMPION, str(version))
    if str(mlflow.get_registered_model(model).aliases.get(CHALLENGER)) == str(version):
        mlflow.delete_registered_model_alias(model, CHALLENGER)
    before = "the first champion"
    if holder:
        before = f"in the place of version {holder.version}{'' if champion else ', which was not proven'}"
    why = f"it passed the gate{' and a person chose it' if by_hand else ''}; {before}"
    return _decision("promoted", why, version, record, model)


def fetch(alias_or_version: str, config: Config) -> Path:
    """Download a version, by alias or number, and prove it; returns its folder, laid out like data/encoders/MIX.

    Downloaded once; proved every time. Raises ModelError when there is no such version, Unproven when its
    weights, scores and gate record do not belong together or it did not pass.
    """
    mlflow = client()
    version = _find(mlflow, config.registry.name, alias_or_version)
    if not version.run_id or "identity" not in version.tags:
        raise Unproven(
            f"Version {version.version} of {config.registry.name} was not registered by the pipeline and carries no "
            "proof. Only what the gate passed can be used or promoted"
        )
    folder = MODELS / config.registry.name / f"{version.version}-{version.run_id[:8]}"
    if not folder.is_dir():
        with TemporaryDirectory() as scratch:
            downloaded = _download(mlflow, version, Path(scratch))
            prove(downloaded)
            with written_aside(folder) as aside:
                shutil.copytree(downloaded, aside)
    prove(folder)
    if identity(folder) != version.tags["identity"]:
        raise Unproven(
            f"Version {version.version} of {config.registry.name} is not what was registered under that number. "
            f"Remove {folder} to download it again; if that does not help, its artifacts were changed"
        )
    return folder


def version_page(model: str, version: int) -> str | None:
    """Where MLflow's UI shows a version; None without a server."""
    uri = tracking_uri()
    return f"{uri}/#/models/{model}/versions/{version}" if uri.startswith("http") else None


def _champion(mlflow: MlflowClient, config: Config) -> tuple[ModelVersion | None, Record | None]:
    """Who holds the alias, and its gate record; without a record it does not deserve the name."""
    model = config.registry.name
    number = mlflow.get_registered_model(model).aliases.get(CHAMPION)
    if not number:
        return None, None
    holder = mlflow.get_model_version(model, str(number))
    try:
        return holder, prove(fetch(str(number), config))
    except (Unproven, ModelError):
        return holder, None


def _against(version: int, champion: int, config: Config) -> list[Record]:
    from textcraftor.evaluate.gate import against_champion
    from textcraftor.evaluate.scores import Scores  # brings torch

    ours, theirs = (Scores.read(fetch(str(number), config) / "evidence/scores.parquet") for number in (version, champion))
    return against_champion(ours, theirs, config)


def _decision(
    verdict: Literal["promoted", "champion stays", "challenger", "not promoted"],
    why: str,
    version: int,
    record: Record,
    model: str,
) -> Decision:
    return Decision(
        verdict=verdict,
        why=why,
        candidate=record["candidate"],
        version=version,
        digest=record["digest"],
        page=version_page(model, version),
    )


def _find(mlflow: MlflowClient, model: str, alias_or_version: str) -> ModelVersion:
    try:
        if alias_or_version.isdigit():
            return mlflow.get_model_version(model, alias_or_version)
        return mlflow.get_model_version_by_alias(model, alias_or_version)
    except MlflowException as error:
        if "API request to" in str(error):
            raise
        raise ModelError(
            f"{model} has no version {alias_or_version!r} in the registry. "
            f"Known: {_known(mlflow, model)}. `make full` makes one"
        ) from None


def _known(mlflow: MlflowClient, model: str) -> str:
    versions = mlflow.search_model_versions(f"name = '{model}'")
    return ", ".join(map(str, sorted(int(version.version) for version in versions))) or "none yet"


def _create_model(mlflow: MlflowClient, model: str) -> None:
    try:
        mlflow.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _download(mlflow: MlflowClient, version: ModelVersion, into: Path) -> Path:
    proxied = "mlflow-artifacts:/"
    if version.source.startswith(proxied) and not tracking_uri().startswith("http"):
        # What `make full` left behind, read without its server: the same files lie in the store.
        return STORE / "artifacts" / version.source.removeprefix(proxied).lstrip("/")
    return Path(mlflow.download_artifacts(version.run_id, ARTIFACT, str(into)))
