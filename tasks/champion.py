"""Making a version champion: compare with the present one, and write a signed entry into the record of promotions.

No Prefect here: `textcraftor rollback` needs no server. The flows call the same functions as tasks (`tasks.registry`).
"""

import getpass
import json
import os
from typing import Any, Literal

from mlflow import MlflowClient

from tasks import aliases, comparison, links, promotions, store
from tasks.decision import Decision
from tasks.store import RegistryUnavailable, client, locked, tracking_uri, without_credentials
from tasks.versions import Champion, fetch_proven, find_champion
from textcraftor.config import Config
from textcraftor.errors import ModelError, Unproven
from textcraftor.trust.verifier import Proven

ATTEMPTS = 8  # comparisons with a champion that is replaced meanwhile


def make_champion(version: int, config: Config, by: str = "", why: str = "") -> Decision:
    """Make a version `champion` if it is proven and no worse than the present champion.

    by: the person who decided; empty for the pipeline. A person may overrule the comparison and replace a champion that
    cannot be compared with; both are recorded. Nobody may overrule the proof.  why: the person's reason.

    Promotions of one project wait for each other. Other machines do not, so the entry counts only if it follows the
    champion that was compared with; if another one came first, the version is compared with that.

    Raises Unproven when weights, scores and statement of the version do not belong together or did not pass,
    RegistryUnavailable when the champion cannot be read now, ConfigError when this machine's key is not believed.
    """
    mlflow, model = client(), config.registry.name
    proven = fetch_proven(str(version), config)
    with locked(store.STORE.parent / "registry.lock"):
        for _ in range(ATTEMPTS):
            champion = find_champion(mlflow, config)
            aliases.correct(mlflow, model, champion)
            if champion.state == "proven" and champion.version == version and champion.signed:
                return decide("champion stays", f"version {version} is the champion", version, proven, model)
            if champion.state == "unknown" and not by:
                raise RegistryUnavailable(champion.describe(model))
            rules = compare(mlflow, version, proven, champion, model)
            failed = [f"{rule['rule']}: {rule['why']}" for rule in rules if not rule["passed"]]
            if champion.state == "disproven" and not by:
                return decide("not promoted", champion.describe(model), version, proven, model)
            if failed and not by:
                reason = f"the champion, version {champion.version}, stays. {'; '.join(failed)}"
                return decide("not promoted", reason, version, proven, model)
            reason = _reason(champion, by, why)
            if promotions.append(
                mlflow, champion.chain, model, version, proven.digest, by or f"the pipeline ({account()})", reason
            ):
                aliases.show_champion(mlflow, model, find_champion(mlflow, config))
                return decide("promoted", reason, version, proven, model)
    raise RegistryUnavailable(
        f"{ATTEMPTS} other promotions of {model} came first while version {version} was compared. Promote it again"
    )


def rollback(config: Config, to: int | None = None, why: str = "") -> Decision:
    """Make the version that was champion before the present one champion again, by one more promotion.

    to: another proven version, by its number.  Raises ModelError when there is no earlier version that is proven.
    """
    model = config.registry.name
    champion = find_champion(client(), config)
    if champion.state == "unknown" and champion.chain.head is None:
        raise RegistryUnavailable(champion.describe(model))
    number = to if to is not None else _earlier(champion, config)
    back = f"rollback from version {champion.version}" if champion.version else "rollback"
    return make_champion(number, config, account(), f"{back}: {why}" if why else back)


def _earlier(champion: Champion, config: Config) -> int:
    """The last champion before the present one that is still what was promoted. Raises ModelError."""
    faults = []
    for entry in reversed(champion.chain.entries[:-1]):
        if entry.version == champion.version:
            continue
        try:
            if fetch_proven(str(entry.version), config).digest == entry.statement:
                return entry.version
            faults.append(f"version {entry.version} is another one now")
        except (Unproven, ModelError) as error:
            faults.append(str(error))
    raise ModelError(
        f"There is no earlier champion of {config.registry.name} to go back to{'. ' if faults else ''}{'; '.join(faults)}. "
        "Name a version: textcraftor rollback --to N"
    )


def compare(mlflow: MlflowClient, version: int, proven: Proven, champion: Champion, model: str) -> list[dict[str, Any]]:
    """Rules of the policy's margins for a version against a proven champion; none against any other.

    They are kept where a person looks before deciding: in the version's card and its tag `against_champion`.
    """
    number, rules = str(version), comparison.rules(proven, champion, model)
    mlflow.set_model_version_tag(model, number, "against_champion", json.dumps(rules))
    if champion.state != "none" and champion.version != version:
        card = comparison.in_card(mlflow.get_model_version(model, number).description or "", champion, rules)
        mlflow.update_model_version(model, number, description=card)
    return rules


def decide(
    verdict: Literal["promoted", "champion stays", "challenger", "not promoted"],
    why: str,
    version: int,
    proven: Proven,
    model: str,
) -> Decision:
    """The decision about a version, with the links and figures that a reader wants."""
    return Decision(
        verdict=verdict,
        why=why,
        candidate=proven.scores.candidate,
        version=version,
        digest=proven.scores.digest,
        page=version_page(model, version),
        worse=client().get_model_version(model, str(version)).tags.get("worse", ""),
    )


def version_page(model: str, version: int) -> str | None:
    """URL of a version in MLflow's UI; None without a server."""
    uri = without_credentials(tracking_uri())
    return links.version_page(uri, model, version) if uri.startswith("http") else None


def account() -> str:
    """Name of the account that this runs as; a container may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def _reason(champion: Champion, by: str, why: str) -> str:
    before = "it is the first champion"
    if champion.state != "none":
        unproven = f", which is {_NOT[champion.state]}: {champion.fault}" if champion.state in _NOT else ""
        before = f"it replaces version {champion.version}{unproven}"
    chosen = f" and a person chose it{f' ({why})' if why else ''}" if by else ""
    return f"it passed the gate{chosen}; {before}"


_NOT = {"disproven": "not proven", "unknown": "not readable now"}
