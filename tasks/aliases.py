"""MLflow's alias `champion`, kept where the signed record of promotions has the champion. Anybody can move an alias.

No Prefect here: the receiver of MLflow's webhooks (`tasks.webhook`) and the flow `watch` call the same function.
"""

from datetime import UTC, datetime
from typing import Final

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks import store
from tasks.store import RegistryUnavailable, client, locked
from tasks.versions import CHALLENGER, CHAMPION, GONE, Champion, find_champion
from textcraftor.config import Config
from textcraftor.errors import Unproven
from textcraftor.layout import POLICIES

CORRECTED: Final = "alias_corrected"  # tag of the versions between which the alias was moved


def watched_models() -> list[str]:
    """The registered models of this project: those that have a policy."""
    return sorted(path.stem for path in (store.ROOT / POLICIES).glob("*.yaml"))


def watch(config: Config, model: str) -> str:
    """Prove the champion of a model again and put its alias back; returns what was found, in one line.

    Raises Unproven when the champion does not hold, after the alias was put back; RegistryUnavailable when it cannot be read
    now.
    """
    named = config.model_copy(update={"registry": config.registry.model_copy(update={"name": model})})
    mlflow = client()
    with locked(store.STORE.parent / "registry.lock"):  # never between the two steps of a promotion on this machine
        champion = find_champion(mlflow, named)
        if champion.state == "unknown":
            raise RegistryUnavailable(champion.describe(model))
        corrected = correct(mlflow, model, champion)
    if champion.state == "disproven":
        raise Unproven(f"{corrected}{'. ' if corrected else ''}{champion.describe(model)}")
    if champion.state == "none":
        return f"{model}: nothing was promoted yet"
    if not champion.signed:
        return f"{model}: version {champion.version} has the alias `{CHAMPION}`, and no signed promotion made it champion"
    return corrected or f"{model}: version {champion.version} is the champion, proven again"


def correct(mlflow: MlflowClient, model: str, champion: Champion) -> str:
    """Put the alias back where the record has the champion; returns what was wrong, or an empty string.

    What was corrected stands in the tag `alias_corrected` of the champion and of the version that had its alias.
    """
    if not champion.signed:
        return ""
    holder = mlflow.get_registered_model(model).aliases.get(CHAMPION)
    show_champion(mlflow, model, champion)
    if holder is not None and int(holder) == champion.version:
        return ""
    where = f"on version {holder}" if holder is not None else "removed"
    entry = champion.chain.entries[-1].sequence
    said = f"the alias `{CHAMPION}` was {where}; entry {entry} of the record names version {champion.version}: put back"
    note = f"{datetime.now(UTC).isoformat(timespec='seconds')}: {said}"
    for number in filter(None, (champion.version, holder)):
        try:
            mlflow.set_model_version_tag(model, str(number), CORRECTED, note)
        except MlflowException as error:
            if error.error_code not in GONE:  # the version was deleted
                raise
    return f"{model}: {said}"


def show_champion(mlflow: MlflowClient, model: str, champion: Champion) -> None:
    """Let MLflow's aliases show what the record says: `champion` on its last entry, `challenger` on no champion."""
    if not champion.signed:
        return
    aliases, number = mlflow.get_registered_model(model).aliases, str(champion.version)
    if str(aliases.get(CHAMPION)) != number:
        try:
            mlflow.set_registered_model_alias(model, CHAMPION, number)
        except MlflowException as error:
            if error.error_code in GONE:  # the version was deleted
                return
            mlflow.set_registered_model_alias(model, CHAMPION, number)  # another machine set it in the same instant
    if str(aliases.get(CHALLENGER)) == number:
        mlflow.delete_registered_model_alias(model, CHALLENGER)
