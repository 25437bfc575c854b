"""A person hands the championship over: `prefect deployment run promote/champion --param version=3`."""

from prefect import flow
from prefect.states import Completed, State

from tasks import registry
from textcraftor.config import load


@flow(name="promote", persist_result=True, result_serializer="json")
def promote(version: int, profile: str | None = None) -> State[registry.Decision]:
    """Make a registered version the champion, an earlier one included, after proving it anew.

    version: its number in the registry.  profile: whose registered model; empty, the one params.yaml names.
    A person may overrule the comparison with the champion, which is recorded; nobody may overrule the gate.
    """
    config = load("params.yaml", {"profile": profile} if profile else None)
    decision = registry.promote(version, config, by_hand=True)
    return Completed(name=decision.verdict.capitalize(), message=decision.why, data=decision)
