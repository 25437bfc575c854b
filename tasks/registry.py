"""The MLflow registry: what becomes a version, and which version is `challenger` and `champion`.

A version never changes: weights, scores and verdict belong together. Aliases can be moved by anybody, so `fetch`,
`challenge` and `promote` prove a version each time; an alias on an unproven version has no effect.
"""

import contextlib
import json
from typing import Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from tasks import comparison, links, store
from tasks.evidence import Record
from tasks.store import ARTIFACT, RegistryUnavailable, client, locked, tracking_uri, without_credentials
from tasks.tracking import candidate_tags, only_if_unavailable
from tasks.versions import CHALLENGER, CHAMPION, Champion, champion_version, fetch, fetch_proven, find_champion, verify_run
from tasks.workspace import Workspace
from textcraftor.config import Config
from textcraftor.errors import Unproven
from textcraftor.trust.verifier import Proven

__all__ = ["Decision", "challenge", "promote", "register", "version_page"]

ATTEMPTS = 3  # comparisons with a champion that is replaced meanwhile


class Decision(BaseModel):
    """How a run ended for its best candidate."""

    verdict: Literal["promoted", "champion stays", "challenger", "judged", "not promoted"]
    why: str
    candidate: str | None = None
    version: int | None = None
    digest: str | None = None
    folder: str = ""
    page: str | None = None
    worse: str = ""  # what got worse than the base, in a sentence


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
    """Give a proven version the alias `challenger`, unless the champion has the same weights. Raises Unproven."""
    mlflow, model = client(), config.registry.name
    proven = fetch_proven(str(version), config)
    with locked(store.STORE.parent / "registry.lock"):
        champion = find_champion(mlflow, config)
        if champion and champion.proven and champion.proven.scores.digest == proven.scores.digest:
            why = f"version {champion.version} is the champion and has the same weights"
            return _decision("champion stays", why, champion.version, proven, model)
        rules = _compare(mlflow, version, proven, champion, model)
        mlflow.set_registered_model_alias(model, CHALLENGER, str(version))
    against = f". {comparison.in_words(champion, rules)}" if champion else ""
    why = f"a person decides: make promote VERSION={version}{against}"
    return _decision("challenger", why, version, proven, model)


@task(
    task_run_name="promote version {version}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def promote(version: int, config: Config, by_hand: bool = False) -> Decision:
    """Make a version `champion` if it is proven and no worse than the present champion.

    by_hand: a person decided; the comparison with the champion is recorded, but does not bind. The proof does.

    Promotions of one project wait for each other. MLflow's UI and other machines do not, so the alias is read again
    before and after it is moved, and a champion that appeared meanwhile is compared with, too.

    Raises Unproven when weights, scores and gate record of the version do not belong together or did not pass,
    RegistryUnavailable when the champion cannot be read now: it is then neither compared with nor replaced.
    """
    mlflow, model = client(), config.registry.name
    proven = fetch_proven(str(version), config)
    with locked(store.STORE.parent / "registry.lock"):
        for _ in range(ATTEMPTS):
            champion = find_champion(mlflow, config)
            if champion and champion.version == version:
                return _decision("champion stays", f"version {version} is the champion", version, proven, model)
            rules = _compare(mlflow, version, proven, champion, model)
            failed = [f"{rule['rule']}: {rule['why']}" for rule in rules if not rule["passed"]]
            if champion and failed and not by_hand:
                why = f"the champion, version {champion.version}, stays. {'; '.join(failed)}"
                return _decision("not promoted", why, version, proven, model)
            if champion_version(mlflow, model) != (champion.version if champion else None):
                continue
            mlflow.set_registered_model_alias(model, CHAMPION, str(version))
            if champion_version(mlflow, model) == version:
                if str(mlflow.get_registered_model(model).aliases.get(CHALLENGER)) == str(version):
                    mlflow.delete_registered_model_alias(model, CHALLENGER)
                return _decision("promoted", _reason(champion, by_hand), version, proven, model)
    raise RegistryUnavailable(
        f"The alias `{CHAMPION}` of {model} was moved by somebody else {ATTEMPTS} times while version {version} was compared. "
        "Promote it again when that has ended"
    )


def version_page(model: str, version: int) -> str | None:
    """URL of a version in MLflow's UI; None without a server."""
    uri = without_credentials(tracking_uri())
    return links.version_page(uri, model, version) if uri.startswith("http") else None


def _compare(mlflow: MlflowClient, version: int, proven: Proven, champion: Champion | None, model: str) -> list[Record]:
    """Rules of the policy's margins for a version against a proven champion; none against any other.

    They are kept where a person looks before deciding: in the version's card and its tag `against_champion`.
    """
    number, rules = str(version), comparison.rules(proven, champion, model)
    mlflow.set_model_version_tag(model, number, "against_champion", json.dumps(rules))
    if champion:
        card = comparison.in_card(mlflow.get_model_version(model, number).description or "", champion, rules)
        mlflow.update_model_version(model, number, description=card)
    return rules


def _reason(champion: Champion | None, by_hand: bool) -> str:
    before = "it is the first champion"
    if champion:
        unproven = "" if champion.proven else f", which is not proven: {champion.fault}"
        before = f"it replaces version {champion.version}{unproven}"
    return f"it passed the gate{' and a person chose it' if by_hand else ''}; {before}"


def _decision(
    verdict: Literal["promoted", "champion stays", "challenger", "not promoted"],
    why: str,
    version: int,
    proven: Proven,
    model: str,
) -> Decision:
    return Decision(
        verdict=verdict,
        why=why,
        candidate=proven.scores.candidate,
        version=version,
        digest=proven.scores.digest,
        page=version_page(model, version),
        worse=client().get_model_version(model, str(version)).tags.get("worse", ""),
    )


def _create_model(mlflow: MlflowClient, model: str) -> None:
    try:
        mlflow.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
