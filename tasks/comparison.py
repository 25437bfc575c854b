"""A version compared with the present champion: the rules of `gate.champion_margin`, and how a person reads them."""

from collections.abc import Sequence

from tasks import store
from tasks.evidence import Record
from tasks.versions import Champion
from textcraftor.evaluate.figures import plain_table, rule_rows
from textcraftor.evaluate.gate import against_champion
from textcraftor.trust.policy import Policy
from textcraftor.trust.verifier import Proven

_HEADING = "\n\n**Against the champion, version "


def rules(version: Proven, champion: Champion, model: str) -> list[Record]:
    """Rules of the model's policy for a version against a proven champion; none against any other."""
    if champion.proven is None:
        return []
    return against_champion(version.scores, champion.proven.scores, Policy.load(model, store.ROOT))


def in_words(champion: Champion, compared: Sequence[Record]) -> str:
    """One sentence for the terminal and for Prefect's pages."""
    if champion.proven is None:
        return f"The champion, version {champion.version}, is not proven: {champion.fault}"
    return f"Against the champion, version {champion.version}: {', '.join(map(_describe, compared)) or 'no rule compares them'}"


def in_card(card: str, champion: Champion, compared: Sequence[Record]) -> str:
    """The model card with this comparison at its end, in place of an earlier one."""
    heading = f"{_HEADING}{champion.version}.** "
    body = "Lower end of the 95 % interval of this version minus the champion."
    table = f"\n\n```text\n{plain_table(rule_rows(compared))}\n```\n" if compared else "\n"
    if champion.proven is None:
        body = f"It is not proven: {champion.fault}"
    return card.split(_HEADING)[0].rstrip() + heading + body + table


def _describe(rule: Record) -> str:
    if rule["value"] is None:
        return f"{rule['judge']} cannot be compared ({rule['why']})"
    outcome = "is not worse" if rule["passed"] else "may be worse"
    return f"{rule['judge']} {outcome} (interval from {rule['value']:+.3f}, at least {rule['bound']:+.3f})"
