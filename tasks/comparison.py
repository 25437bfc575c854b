"""A version compared with the present champion: the rules of `gate.champion_margin`, and how a person reads them."""

from collections.abc import Sequence
from pathlib import Path

from tasks.evidence import Record
from tasks.versions import Champion
from textcraftor.config import Config
from textcraftor.evaluate.figures import plain_table, rule_rows

_HEADING = "\n\n**Against the champion, version "


def rules(folder: Path, champion: Champion | None, config: Config) -> list[Record]:
    """Rules for the version in `folder` against a proven champion; none against any other."""
    if champion is None or champion.folder is None:
        return []
    from textcraftor.evaluate.gate import against_champion
    from textcraftor.evaluate.scores import Scores

    candidate, present = (Scores.read(each / "evidence/scores.parquet") for each in (folder, champion.folder))
    return against_champion(candidate, present, config)


def in_words(champion: Champion, compared: Sequence[Record]) -> str:
    """One sentence for the terminal and for Prefect's pages."""
    if champion.record is None:
        return f"The champion, version {champion.version}, is not proven: {champion.fault}"
    return f"Against the champion, version {champion.version}: {', '.join(map(_describe, compared)) or 'no rule compares them'}"


def in_card(card: str, champion: Champion, compared: Sequence[Record]) -> str:
    """The model card with this comparison at its end, in place of an earlier one."""
    heading = f"{_HEADING}{champion.version}.** "
    body = "Lower end of the 95 % interval of this version minus the champion."
    table = f"\n\n```text\n{plain_table(rule_rows(compared))}\n```\n" if compared else "\n"
    if champion.record is None:
        body = f"It is not proven: {champion.fault}"
    return card.split(_HEADING)[0].rstrip() + heading + body + table


def _describe(rule: Record) -> str:
    if rule["value"] is None:
        return f"{rule['judge']} cannot be compared ({rule['why']})"
    outcome = "is not worse" if rule["passed"] else "may be worse"
    return f"{rule['judge']} {outcome} (interval from {rule['value']:+.3f}, at least {rule['bound']:+.3f})"
