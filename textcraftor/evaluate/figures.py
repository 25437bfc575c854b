"""A candidate's figures as people read them, alike in the terminal, the report, the model card and Prefect's pages.

metrics: a metrics.json.  claims, base_claims: the claims.json of the candidate and of the base; None where no oracle judges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from textcraftor.evaluate.scores import DIVERSITY, ORACLE
from textcraftor.layout import BASE, report_folder

NOTICED: Final = 0.005  # a share of claims that falls by less is no loss worth a word
NAMED: Final = 6  # losses in a sentence; the tables have all
Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
Row = dict[str, str]


@dataclass(frozen=True)
class Claim:
    """A kind of claim that prompts make ("colour"), or all claims of plain or of rich prompts, and how often they hold."""

    name: str
    count: int
    base: float  # share that holds
    tuned: float

    @property
    def points(self) -> float:
        """Change in percentage points."""
        return 100 * (self.tuned - self.base)


def read_claims(candidate: str, root: Path) -> list[Claim]:
    """Claims of a candidate in a workspace; none where no oracle judges."""
    paths = [root / report_folder(name) / "claims.json" for name in (candidate, BASE)]
    if not all(path.is_file() for path in paths):
        return []
    return compare_claims(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def compare_claims(claims: Counts | None, base_claims: Counts | None) -> list[Claim]:
    """A row for each kind of claim, then for each language."""
    if claims is None or base_claims is None:
        return []
    return [
        Claim(name if axis == "kind" else f"{name} prompts", count["of"], _share(base_claims[axis][name]), _share(count))
        for axis, names in claims.items()
        for name, count in names.items()
    ]


def headline(metrics: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """What the candidate gains, in one sentence without terms of the field."""
    judges = metrics["judges"]
    if claims and ORACLE in judges:
        oracle = judges[ORACLE]
        return f"Its pictures show {oracle['mean']:.0%} of what the prompts say, the base's {oracle['base_mean']:.0%}."
    held_out = [name for name, judge in judges.items() if not judge["trained_on"]]
    name = (held_out or list(judges))[0]
    known = "which it was not trained on" if held_out else "which it was trained on"
    return f"{name}, {known}, prefers it to the base on {judges[name]['win_rate']:.0%} of the prompts."


def losses(metrics: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """What got worse than the base, the largest losses of claims first, in one sentence.

    Claims that fall by half a point or more, judges whose interval lies below zero, and diversity likewise.
    """
    fallen = sorted((claim for claim in claims if claim.points <= -100 * NOTICED), key=lambda claim: claim.points)
    found = [f"{claim.name} {claim.points:+.1f} points" for claim in fallen]
    found += [
        f"{name} {number(judge['delta'], judge, signed=True)}"
        for name, judge in metrics["judges"].items()
        if judge["ci_high"] < 0 and not (claims and name == ORACLE)
    ]
    diversity = metrics[DIVERSITY]
    if diversity["ci_high"] < 0 and diversity["ratio"] is not None:
        found.append(f"{DIVERSITY} x {diversity['ratio']:.2f}")
    if not found:
        return "Nothing that was measured is worse than the base."
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"Worse than the base: {', '.join(found[:NAMED])}{more}."


def score_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """One row of text for each judge, then diversity."""
    rows = [
        {
            "judge": name,
            "trained on": "yes" if judge["trained_on"] else "no",
            "base": number(judge["base_mean"], judge),
            "tuned": number(judge["mean"], judge),
            "difference": number(judge["delta"], judge, signed=True),
            "95 % interval": interval(judge),
            "wins": f"{judge['win_rate']:.0%}",
        }
        for name, judge in metrics["judges"].items()
    ]
    figures = metrics[DIVERSITY]
    last = {
        "judge": DIVERSITY,
        "trained on": "",
        "base": number(figures["base_mean"], figures),
        "tuned": number(figures["mean"], figures),
        "difference": "" if figures["ratio"] is None else f"x {figures['ratio']:.2f}",
        "95 % interval": "",
        "wins": "",
    }
    return [*rows, last]


def claim_rows(claims: Sequence[Claim]) -> list[Row]:
    """One row of text for each kind of claim, then for each language."""
    return [
        {
            "claim": claim.name,
            "claims": f"{claim.count:,}",
            "base": f"{claim.base:.1%}",
            "tuned": f"{claim.tuned:.1%}",
            "change": f"{claim.points:+.1f} points",
        }
        for claim in claims
    ]


def rule_rows(rules: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row of text for each rule of a gate record."""
    return [
        {
            "rule": rule["rule"],
            "value": "none" if rule["value"] is None else f"{rule['value']:.3f}",
            "at least": "none" if rule["bound"] is None else f"{rule['bound']:.3f}",
            "": "passed" if rule["passed"] else "NOT PASSED",
            "why": rule["why"],
        }
        for rule in rules
    ]


def number(value: float, figures: Mapping[str, Any], signed: bool = False) -> str:
    """A score, or a difference of scores, with as many decimals as the judge's scale needs: three digits for its means."""
    largest = max(abs(figures["mean"]), abs(figures["base_mean"]))
    decimals = 3 if largest < 1 else 2 if largest < 100 else 1
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.replace("-", "+") if float(text) == 0 and signed else text


def interval(figures: Mapping[str, Any]) -> str:
    """The 95 % interval of a difference."""
    return f"{number(figures['ci_low'], figures, signed=True)} .. {number(figures['ci_high'], figures, signed=True)}"


def plain_table(
    rows: Sequence[Mapping[str, str]], left: Sequence[str] = ("judge", "trained on", "claim", "rule", "why")
) -> str:
    """Rows as text in aligned columns, for a fixed-width font; columns named in `left` are aligned to the left."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}

    def line(row: Mapping[str, str]) -> str:
        cells = [row[name].ljust(width) if name in left else row[name].rjust(width) for name, width in widths.items()]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in ({name: name for name in widths}, *rows))


def _share(count: Mapping[str, int]) -> float:
    return count["held"] / count["of"]
