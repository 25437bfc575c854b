"""Versions in the MLflow registry: finding, downloading and proving them, and who is champion.

Two kinds of trouble are kept apart. What is gone or damaged is `Unproven`; a person decides what takes its place. What
cannot be read right now (server down, database locked, disk error) is `RegistryUnavailable`: the task is retried.
Neither lets a candidate replace a champion that it was never compared with.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import requests
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks import promotions, store
from tasks.store import ARTIFACT, RegistryUnavailable, client, locked, scratch, tracking_uri, without_credentials
from textcraftor.artifact import written_aside
from textcraftor.config import Config
from textcraftor.errors import ModelError, Unproven
from textcraftor.snapshot import private_copy
from textcraftor.trust.promotion import Chain
from textcraftor.trust.verifier import Proven, verify

CHALLENGER, CHAMPION = "challenger", "champion"
# What MLflow answers when something does not exist or never did; any other refusal may be temporary.
GONE = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Champion:
    """What is known about the champion of a registered model.

    state: `none` when nothing was promoted yet; `proven`; `disproven` when it is gone, damaged or was not promoted by a
    signed entry of the record; `unknown` when it cannot be read now.  version: its number, where that is known.  fault: why
    it is disproven or unknown.  chain: the record of promotions.
    """

    state: Literal["none", "proven", "disproven", "unknown"]
    version: int | None = None
    proven: Proven | None = None
    fault: str = ""
    chain: Chain = field(default_factory=Chain)

    @property
    def signed(self) -> bool:
        """Whether the record names it. The holder of an alias from before there was a record is not signed."""
        return self.chain.head is not None and not self.chain.fault

    def describe(self, model: str) -> str:
        """What is wrong, and which command mends it."""
        which = f"version {self.version} of {model}" if self.version else model
        if self.state == "unknown":
            return f"The champion, {which}, cannot be read: {self.fault}. A person may replace it: make promote VERSION=N"
        return (
            f"The champion, {which}, is not proven: {self.fault}. A person decides: `make promote VERSION=N` makes another "
            "version champion, `textcraftor rollback` the one before it"
        )


def fetch(alias_or_version: str, config: Config, private: Path | None = None) -> Path:
    """The folder of a proven version, laid out like data/encoders/MIX. See `fetch_proven`."""
    return fetch_proven(alias_or_version, config, private).folder


def fetch_proven(alias_or_version: str, config: Config, private: Path | None = None) -> Proven:
    """Download a version, by alias or number, and verify it. The champion is the one that the record of promotions names.

    A version is downloaded once and verified on every call; a damaged download is replaced.
    private: a folder for a copy of it, which is then what is verified: nobody exchanges it before it is loaded.
    Raises ModelError when there is no such version, Unproven when its evidence is gone, damaged or does not hold,
    RegistryUnavailable when it cannot be read now.
    """
    model = config.registry.name
    if alias_or_version == CHAMPION:
        champion = find_champion(client(), config, private)
        if champion.state == "unknown":
            raise RegistryUnavailable(champion.describe(model))
        if champion.state == "disproven":
            raise Unproven(champion.describe(model))
        if champion.proven:
            if not champion.signed:
                raise Unproven(
                    f"Version {champion.version} of {model} has the alias `{CHAMPION}`; no signed promotion made it champion. "
                    f"`make promote VERSION={champion.version}` does"
                )
            return champion.proven
    with _unavailable_in_one_line(f"version {alias_or_version} of {model}"):
        mlflow = client()
        version = _find(mlflow, model, alias_or_version)
        if not version.run_id or "statement" not in version.tags:
            raise Unproven(
                f"{_not_proven(model, version.version)}the pipeline did not register it, or did so before statements were "
                "signed. Only what passed the gate can be used or promoted; the pipeline registers such a candidate again"
            )
        models = store.STORE.parent / "models" / model
        folder = models / f"{version.version}-{version.run_id[:8]}"
        try:
            return _check(folder, version, private)
        except Unproven:  # not downloaded yet, or the download is damaged
            with locked(models / "lock"):
                return _repair(folder, mlflow, version, private)


def verify_run(run_id: str, model: str) -> Proven:
    """Verify the candidate that a run has logged, before it becomes a version. Its folder is gone afterwards.

    Raises Unproven, RegistryUnavailable.
    """
    with _unavailable_in_one_line(f"run {run_id} of {model}"), scratch() as empty:
        mlflow = client()
        source = f"{mlflow.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
        return verify(_download(mlflow, source, run_id, f"Run {run_id}: ", empty), model, store.ROOT)


def champion_statement(model: str) -> str | None:
    """Digest of the statement of the version that the signed record names champion; None where it names none.

    Raises RegistryUnavailable.
    """
    with _unavailable_in_one_line(f"the champion of {model}"):
        chain = promotions.read(client(), model)
    return chain.head.statement if chain.head and not chain.fault else None


def find_champion(mlflow: MlflowClient, config: Config, private: Path | None = None) -> Champion:
    """Who is champion, and whether that is proven. Raises ConfigError when the model has no policy or a key is damaged.

    The record of promotions says who. In a registry without a record, the alias does, until the first promotion.
    """
    model, chain, number = config.registry.name, Chain(), None
    try:
        with _unavailable_in_one_line(f"the champion of {model}"):
            chain = promotions.read(mlflow, model)
            number = chain.head.version if chain.head else _alias_holder(mlflow, model)
        if chain.fault:
            return Champion("disproven", number, None, chain.fault, chain)
        if number is None:
            return Champion("none", chain=chain)
        proven = fetch_proven(str(number), config, private)
    except (Unproven, ModelError) as error:
        return Champion("disproven", number, None, str(error).removeprefix(_not_proven(model, number or "")), chain)
    except RegistryUnavailable as error:
        return Champion("unknown", number, None, str(error), chain)
    if chain.head and proven.digest != chain.head.statement:
        fault = "it is not the version that was promoted under this number"
        return Champion("disproven", number, None, fault, chain)
    return Champion("proven", number, proven, "", chain)


def _alias_holder(mlflow: MlflowClient, model: str) -> int | None:
    """The version with the alias `champion`; None where there is none, or no such model."""
    try:
        number = mlflow.get_registered_model(model).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
        return None
    return int(number) if number else None


def _check(folder: Path, version: ModelVersion, private: Path | None = None) -> Proven:
    """Raises Unproven unless `folder` holds what the version's statement says, and the statement is the registered one."""
    try:
        if private and folder.is_dir():
            folder = private_copy(folder, private)
        proven = verify(folder, version.name, store.ROOT)
    except Unproven as error:
        raise Unproven(f"{_not_proven(version.name, version.version)}{error}") from None
    if proven.digest != version.tags["statement"]:
        raise Unproven(f"{_not_proven(version.name, version.version)}its statement is not the one that was registered")
    return proven


def _repair(folder: Path, mlflow: MlflowClient, version: ModelVersion, private: Path | None) -> Proven:
    """Download a version to `folder`, unless another process just did. Raises Unproven."""
    with contextlib.suppress(Unproven):
        return _check(folder, version, private)
    name = _not_proven(version.name, version.version)
    with scratch() as empty:
        downloaded = _download(mlflow, version.source or "", version.run_id or "", name, empty)
        _check(downloaded, version)
        with written_aside(folder) as aside:
            shutil.copytree(downloaded, aside)
    return _check(folder, version, private)


def _download(mlflow: MlflowClient, source: str, run_id: str, name: str, into: Path) -> Path:
    """The folder of a run's candidate. Raises Unproven, beginning with `name`, when it is gone."""
    gone = f"{name}its artifacts are gone"
    proxied = "mlflow-artifacts:/"
    if source.startswith(proxied) and not tracking_uri().startswith("http"):
        # Written by `make full` through its server and read without one: the same files are in the store.
        folder = store.STORE / "artifacts" / source.removeprefix(proxied).lstrip("/")
        if ".." in Path(source).parts or not folder.is_dir():
            raise Unproven(gone)
        return folder
    try:
        if not mlflow.list_artifacts(run_id, ARTIFACT):
            raise Unproven(gone)
        return Path(mlflow.download_artifacts(run_id, ARTIFACT, str(into)))
    except MlflowException as error:
        if error.error_code in GONE:
            raise Unproven(f"{gone} ({' '.join(str(error.message).split())})") from None
        raise


def _not_proven(model: str, version: int | str) -> str:
    return f"Version {version} of {model} is not proven: "


def _find(mlflow: MlflowClient, model: str, alias_or_version: str) -> ModelVersion:
    try:
        if alias_or_version.isdigit():
            return mlflow.get_model_version(model, alias_or_version)
        return mlflow.get_model_version_by_alias(model, alias_or_version)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
        versions = sorted(int(version.version) for version in mlflow.search_model_versions(f"name = '{model}'"))
        known = ", ".join(map(str, versions))
        if not versions:
            raise ModelError(f"{model} has no version in the registry yet. `make full` makes one") from None
        if alias_or_version.isdigit():
            raise ModelError(f"{model} has no version {alias_or_version} in the registry. Known: {known}") from None
        advice = f"Name one of its versions: {known}"
        if alias_or_version == CHAMPION:
            advice = f"`make promote VERSION=N` makes one of its versions champion: {known}; or name one of them instead"
        raise ModelError(f"{model} has no {alias_or_version} in the registry. {advice}") from None


@contextlib.contextmanager
def _unavailable_in_one_line(what: str) -> Iterator[None]:
    """Turn any failure to read the registry into RegistryUnavailable; UserErrors pass."""
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        message = (
            f"{what[0].upper()}{what[1:]} cannot be read from MLflow at {tracking_uri()} now: {reason}. Try again when it can"
        )
        raise RegistryUnavailable(without_credentials(message)) from error
