"""The verdict of the gate stage, checked against the weights in the workspace."""

import json
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.evidence import Record
from tasks.workspace import Workspace
from textcraftor.candidate import Candidate
from textcraftor.errors import Unproven
from textcraftor.layout import GATE_RECORD


@dataclass(frozen=True)
class Verdict:
    """Each candidate's gate record, and the winner among those that passed; None when no candidate did."""

    winner: str | None
    records: dict[str, Record]

    def failed_rules(self) -> list[str]:
        """Each rule that a candidate did not pass, with its value and bound, as a sentence."""
        return [
            f"{name}: {rule['rule']} = {figure(rule['value'])}, at least {figure(rule['bound'])}"
            for name, record in self.records.items()
            for rule in record["rules"]
            if not rule["passed"]
        ]


@task(cache_policy=NO_CACHE)
def read_verdict(workspace: Workspace) -> Verdict:
    """Read data/reports/gate.json.

    Raises Unproven when a candidate's weights are not the ones that were judged.
    """
    path = workspace.folder / GATE_RECORD
    gate = json.loads(path.read_text(encoding="utf-8"))
    for name, record in gate["candidates"].items():
        if (now := Candidate.find(name, workspace.folder).digest) != record["digest"]:
            raise Unproven(
                f"{name}: its weights have digest {now[:12]}, {path} is about {str(record['digest'])[:12]}. "
                "They changed after they were judged; run the pipeline again"
            )
    return Verdict(gate["winner"], gate["candidates"])


def figure(value: float | None) -> str:
    """A value or bound of a rule, for people."""
    return "nothing" if value is None else f"{value:.3f}"
