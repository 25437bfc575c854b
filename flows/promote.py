"""A person chooses the champion: `make promote VERSION=3`."""

from prefect import State, flow
from prefect.states import Completed

from flows.errors import log_user_errors_in_one_line
from tasks import registry
from tasks.champion import account
from tasks.decision import Decision
from textcraftor.config import load


@flow(name="promote", persist_result=True, result_serializer="json")
def promote(version: int, profile: str | None = None, by: str = "", why: str = "") -> State[Decision]:
    """Prove a registered version again and make it the champion; it may be an earlier one.

    version: its number in the registry.  profile: selects the registered model; empty for the one in params.yaml.
    by: who decides; empty for the account that runs this.  why: the reason. Both stand in the record of promotions.
    A person may overrule the comparison with the champion, which is recorded. Nobody may overrule the gate.
    """
    log_user_errors_in_one_line()
    config = load("params.yaml", {"profile": profile} if profile else None)
    decision = registry.promote(version, config, by or account(), why)
    return Completed(message=f"{decision.verdict}: {decision.why}", data=decision)
