"""The gate: which candidates may be promoted, and which of them wins. A pure function of scores and thresholds.

It never crashes on a candidate: what cannot be judged (no scores, a judge missing, a score that is no number,
other prompts than the base's) fails, and the record says why.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textcraftor.artifact import write_json, written_aside
from textcraftor.config import Config, GateRule
from textcraftor.errors import UserError
from textcraftor.evaluate.scores import DIVERSITY, Scores
from textcraftor.evaluate.statistics import compare, fault_of
from textcraftor.layout import BASE, GATE_RECORD, scores_file

Record = dict[str, Any]


def gate(config: Config, root: Path) -> Path:
    """Judge every candidate of the run by its scores; writes data/reports/gate.json and gate.md, returns the former.

    A gate that nobody passes is a verdict, not an error.  Raises ModelError when a table of scores is damaged.
    """
    paths = {name: root / scores_file(name) for name in (BASE, *config.candidates)}
    record = decide({name: Scores.read(path) for name, path in paths.items() if path.exists()}, config)
    path = root / GATE_RECORD
    write_json(path, record)
    with written_aside(path.with_suffix(".md")) as aside:
        aside.write_text(markdown(record), encoding="utf-8")
    return path


def decide(scores: Mapping[str, Scores], config: Config) -> Record:
    """The gate record: {passed, winner, thresholds, candidates: {NAME: {passed, digest, rules, metrics}}}.

    scores: by candidate, `base` among them.  Each rule holds {rule, judge, metric, value, bound, passed, why}; a value
    that could not be had is None and fails.  The winner is, of the candidates that pass, the one with the best delta
    of `gate.rank_by`; of equals, the first by name.
    """
    base = scores.get(BASE)
    candidates = {name: _judge_candidate(name, scores.get(name), base, config) for name in config.candidates}
    rank_by = config.gate.rank_by
    passing = [name for name, record in candidates.items() if record["passed"]]
    ranked = sorted(passing, key=lambda name: (-candidates[name]["metrics"]["judges"][rank_by]["delta"], name))
    return {
        "passed": bool(ranked),
        "winner": ranked[0] if ranked else None,
        "thresholds": config.gate.model_dump(mode="json"),
        "candidates": candidates,
    }


def against_champion(candidate: Scores, champion: Scores, config: Config) -> list[Record]:
    """Rules of `gate.champion_margin`: the candidate is not inferior to the champion, judge by judge.

    Both were scored on the same prompts and noise.  A judge passes when the lower end of the paired interval of
    candidate minus champion lies above minus its margin: it is then worse by less than the margin, beyond chance.
    """
    rules = []
    for judge, margin in config.gate.champion_margin.items():
        unlike = candidate.unlike(champion, judge)
        metrics, fault = (None, unlike) if unlike else _compare(candidate, champion, (judge,), config)
        value = metrics["judges"][judge]["ci_low"] if metrics else None
        why = fault or f"not worse than the champion by {margin} or more"
        rules.append(_verdict(f"champion.{judge}.ci_low", judge, "ci_low", value, -margin, why))
    return rules


def markdown(record: Record) -> str:
    """The record as a page: the verdict, then a table of rules for each candidate."""
    winner = record["winner"]
    lines = ["# Gate", "", f"**{winner}** wins." if winner else "**No candidate passes.**"]
    for name, candidate in record["candidates"].items():
        lines += ["", f"## {name}: {'passed' if candidate['passed'] else 'failed'}", ""]
        lines += ["| rule | value | at least | verdict | why |", "|---|---:|---:|---|---|"]
        for rule in candidate["rules"]:
            verdict = "passed" if rule["passed"] else "**failed**"
            why = rule["why"].replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {rule['rule']} | {_number(rule['value'])} | {_number(rule['bound'])} | {verdict} | {why} |")
    return "\n".join(lines) + "\n"


def _judge_candidate(name: str, scores: Scores | None, base: Scores | None, config: Config) -> Record:
    if scores is None or base is None:
        missing = name if scores is None else BASE
        metrics, fault = None, f"{missing} has no scores. Run `textcraftor evaluate --candidate {missing}`"
        faults: dict[str, str] = {}
    else:
        faults = _faults(scores, base, config)
        usable = tuple(judge for judge in config.evaluate.judges if judge not in faults)
        metrics, fault = (None, "") if DIVERSITY in faults else _compare(scores, base, usable, config)
    rules = [_apply(rule, metrics, fault or faults.get(rule.judge, "")) for rule in config.gate.rules]
    if metrics is not None and config.gate.rank_by not in metrics["judges"]:
        # Without it the candidate could pass, but never be ranked.
        why = faults.get(config.gate.rank_by, "gate.rank_by names a judge that is not among evaluate.judges")
        rules.append(_verdict(f"{config.gate.rank_by}.delta", config.gate.rank_by, "delta", None, None, why))
    return {
        "passed": metrics is not None and all(rule["passed"] for rule in rules),
        "digest": scores.digest if scores else None,
        "rules": rules,
        "metrics": metrics,
    }


def _faults(scores: Scores, base: Scores, config: Config) -> dict[str, str]:
    """Judge -> why its scores cannot be used."""
    faults = {}
    for judge in (*config.evaluate.judges, DIVERSITY):
        for side in (scores, base):
            if fault := fault_of(side.table, judge):
                faults[judge] = f"{side.candidate}: {fault}"
        if unlike := scores.unlike(base, judge):
            faults[judge] = unlike
    return faults


def _compare(scores: Scores, base: Scores, judges: tuple[str, ...], config: Config) -> tuple[Record | None, str]:
    """(metrics, "") or (None, why there are none)."""
    try:
        return compare(scores.table, base.table, judges, scores.trained_on, config.evaluate), ""
    except UserError as error:
        return None, str(error)


def _apply(rule: GateRule, metrics: Record | None, fault: str) -> Record:
    figures = {**metrics["judges"], DIVERSITY: metrics["diversity"]} if metrics else {}
    value = figures.get(rule.judge, {}).get(rule.metric)
    why = fault or (rule.why if value is not None else f"{rule.judge} has no {rule.metric}")
    return _verdict(f"{rule.judge}.{rule.metric}", rule.judge, rule.metric, value, rule.at_least, why)


def _verdict(rule: str, judge: str, metric: str, value: float | None, bound: float | None, why: str) -> Record:
    passed = value is not None and bound is not None and math.isfinite(value) and value >= bound
    return {
        "rule": rule,
        "judge": judge,
        "metric": metric,
        "value": value,
        "bound": bound,
        "passed": passed,
        "why": why,
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
