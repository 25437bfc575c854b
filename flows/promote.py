"""A person chooses the champion: `prefect deployment run promote/champion --param version=3`."""

from prefect import State, flow
from prefect.states import Completed

from tasks import registry
from textcraftor.config import load


@flow(name="promote", persist_result=True, result_serializer="json")
def promote(version: int, profile: str | None = None) -> State[registry.Decision]:
    """Prove a registered version again and make it the champion; it may be an earlier one.

    version: its number in the registry.  profile: selects the registered model; empty for the one in params.yaml.
    A person may overrule the comparison with the champion, which is recorded. Nobody may overrule the gate.
    """
    config = load("params.yaml", {"profile": profile} if profile else None)
    decision = registry.promote(version, config, by_hand=True)
    return Completed(name=decision.verdict.capitalize(), message=decision.why, data=decision)
