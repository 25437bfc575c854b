"""The gate as the flow sees it: the stage's verdict, held against the weights as they lie there now."""

import json
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.evidence import Record, Unproven, candidate_digest
from tasks.workspace import Workspace
from textcraftor.layout import GATE_RECORD


@dataclass(frozen=True)
class Verdict:
    """Each candidate's gate record, and the winner among those that passed (None: nobody did)."""

    winner: str | None
    records: dict[str, Record]

    def failed_rules(self) -> list[str]:
        """In words, what each candidate that did not pass fell short of."""
        return [
            f"{name}: {rule['rule']} = {_figure(rule['value'])}, at least {_figure(rule['bound'])}"
            for name, record in self.records.items()
            for rule in record["rules"]
            if not rule["passed"]
        ]


@task(cache_policy=NO_CACHE)
def read_verdict(workspace: Workspace) -> Verdict:
    """What the gate stage decided.

    Raises Unproven when a candidate's weights are not the ones that were judged.
    """
    path = workspace.folder / GATE_RECORD
    gate = json.loads(path.read_text(encoding="utf-8"))
    for name, record in gate["candidates"].items():
        if (now := candidate_digest(name, workspace)) != record["digest"]:
            raise Unproven(
                f"{name}: its weights have digest {now[:12]}, {path} is about {str(record['digest'])[:12]}. "
                "They changed after they were judged; run the pipeline again"
            )
    return Verdict(gate["winner"], gate["candidates"])


def _figure(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4f}"
