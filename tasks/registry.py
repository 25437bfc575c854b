"""The MLflow registry: what becomes a version, and which version is `challenger` and `champion`.

A version never changes: weights, scores and verdict belong together. Aliases can be moved by anybody, so `fetch`,
`challenge` and `promote` prove a version each time; an alias on an unproven version has no effect.
"""

import contextlib

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import aliases, comparison, store
from tasks.champion import compare, decide, make_champion, version_page
from tasks.decision import Decision
from tasks.evidence import Record
from tasks.store import ARTIFACT, RegistryUnavailable, client, locked
from tasks.tracking import candidate_tags, only_if_unavailable
from tasks.versions import CHALLENGER, fetch, fetch_proven, find_champion, verify_run
from tasks.workspace import Workspace
from textcraftor.config import Config
from textcraftor.errors import Unproven

__all__ = ["challenge", "decline", "promote", "register", "version_page"]


@task(
    task_run_name="register {name}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def register(name: str, run_id: str, record: Record, workspace: Workspace) -> int:
    """Make a tracked candidate a version of the registered model, after verifying it; returns the version's number.

    A candidate with the identity of an existing, proven version is that version.
    Raises Unproven for one that did not pass.
    """
    mlflow, model = client(), workspace.config.registry.name
    run = mlflow.get_run(run_id)
    if refused := run.data.tags.get("refused"):
        raise Unproven(f"{refused}. Only what passed becomes a version")
    proven = verify_run(run_id, model)
    key = run.data.tags["identity"]
    with locked(store.STORE.parent / "registry.lock"):
        known = mlflow.search_model_versions(f"name = '{model}' and tags.identity = '{key}'")
        for number in sorted(int(version.version) for version in known):
            with contextlib.suppress(Unproven):  # its artifacts are gone or damaged: this candidate needs a new version
                fetch(str(number), workspace.config)
                return number
        _create_model(mlflow, model)
        version = mlflow.create_model_version(
            model,
            source=f"{run.info.artifact_uri}/{ARTIFACT}",
            run_id=run_id,
            tags={**candidate_tags(name, record, workspace), "identity": key, "statement": proven.digest},
            description=run.data.tags["mlflow.note.content"],
        )
        return int(version.version)


@task(
    task_run_name="challenge with version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def challenge(version: int, config: Config) -> Decision:
    """Give a proven version the alias `challenger`, unless the champion has the same weights.

    Raises Unproven, and RegistryUnavailable when the champion cannot be read now.
    """
    mlflow, model = client(), config.registry.name
    proven = fetch_proven(str(version), config)
    with locked(store.STORE.parent / "registry.lock"):
        champion = find_champion(mlflow, config)
        if champion.state == "unknown":
            raise RegistryUnavailable(champion.describe(model))
        aliases.correct(mlflow, model, champion)
        if champion.proven and champion.signed and champion.proven.scores.digest == proven.scores.digest:
            why = f"version {champion.version} is the champion and has the same weights"
            return decide("champion stays", why, champion.version or version, proven, model)
        rules = compare(mlflow, version, proven, champion, model)
        mlflow.set_registered_model_alias(model, CHALLENGER, str(version))
    against = f". {comparison.in_words(champion, rules)}" if champion.state != "none" else ""
    why = f"a person decides: make promote VERSION={version}{against}"
    return decide("challenger", why, version, proven, model)


@task(
    task_run_name="promote version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def promote(version: int, config: Config, by: str = "", why: str = "") -> Decision:
    """Make a version `champion` (see `make_champion`)."""
    return make_champion(version, config, by, why)


@task(
    task_run_name="decline version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def decline(version: int, config: Config, by: str, why: str) -> Decision:
    """Leave the champion where it is and take the alias `challenger` from a version; its tag `review` says who and why."""
    mlflow, model, number = client(), config.registry.name, str(version)
    proven = fetch_proven(number, config)
    with locked(store.STORE.parent / "registry.lock"):
        if str(mlflow.get_registered_model(model).aliases.get(CHALLENGER)) == number:
            mlflow.delete_registered_model_alias(model, CHALLENGER)
    said = f"{by} declined it: {why}"
    mlflow.set_model_version_tag(model, number, "review", said)
    mlflow.set_model_version_tag(model, number, "validation_status", "declined")
    return decide("not promoted", said, version, proven, model)


def _create_model(mlflow: MlflowClient, model: str) -> None:
    try:
        mlflow.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
