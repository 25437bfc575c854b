"""The gate: which candidates may be promoted, and which of them wins. A pure function of scores and thresholds.

A candidate that cannot be judged (no scores, a missing judge, a score that is not finite, other prompts than the base's)
fails, and the record says why.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from textcraftor.artifact import write_json, written_aside
from textcraftor.config import MATRIX, ORACLE_JUDGES, Config, EvaluateConfig, GateConfig, GateRule
from textcraftor.errors import Unproven, UserError
from textcraftor.evaluate.scores import DIVERSITY, Scores
from textcraftor.evaluate.signed_scores import read_signed
from textcraftor.evaluate.statistics import compare, score_fault
from textcraftor.heldout import Fingerprint, same_weights
from textcraftor.layout import BASE, GATE_RECORD, scores_file, scores_signature
from textcraftor.signing import Keyring

Record = dict[str, Any]


class Terms(Protocol):
    """What a verdict depends on: a run's configuration, or the policy of a registered model."""

    @property
    def evaluate(self) -> EvaluateConfig: ...

    @property
    def gate(self) -> GateConfig: ...


def gate(config: Config, root: Path) -> Path:
    """Judge every candidate of the run by its scores; write gate.json and gate.md, and return the path of the former.

    Scores that this project's evaluation did not sign count as missing. That no candidate passes is a verdict, not an error.
    """
    keys, scores, faults = Keyring(root).believed(), {}, {}
    for name in (BASE, *config.candidates):
        if (root / scores_file(name)).exists():
            try:
                scores[name], _ = read_signed(root / scores_file(name), root / scores_signature(name), keys)
            except Unproven as error:
                faults[name] = f"{error}. Run `textcraftor evaluate --candidate {name}` again"
    record = decide(scores, config, faults)
    path = root / GATE_RECORD
    write_json(path, record)
    with written_aside(path.with_suffix(".md")) as aside:
        aside.write_text(markdown(record), encoding="utf-8")
    return path


def decide(scores: Mapping[str, Scores], config: Config, faults: Mapping[str, str] | None = None) -> Record:
    """The gate record: {passed, winner, thresholds, candidates: {NAME: {passed, digest, rules, metrics}}}.

    scores: by candidate, including `base`.  faults: why a candidate's scores cannot be used.  Each rule is
    {rule, judge, metric, value, bound, passed, why}; a value that could not be computed is None and fails.  The winner is
    the candidate with the best delta of `gate.rank_by` among those that pass; among equals, the first by name.
    """
    base = scores.get(BASE)
    faults = faults or {}
    candidates = {name: judge_candidate(name, scores.get(name), base, config, faults) for name in config.candidates}
    rank_by = config.gate.rank_by
    passing = [name for name, record in candidates.items() if record["passed"]]
    ranked = sorted(passing, key=lambda name: (-candidates[name]["metrics"]["judges"][rank_by]["delta"], name))
    return {
        "passed": bool(ranked),
        "winner": ranked[0] if ranked else None,
        "thresholds": config.gate.model_dump(mode="json"),
        "candidates": candidates,
    }


def against_champion(candidate: Scores, champion: Scores, config: Terms) -> list[Record]:
    """Rules of `gate.champion_margin`: the candidate is not inferior to the champion, judge by judge.

    A judge passes when the lower end of the paired interval of candidate minus champion lies above minus its margin:
    the candidate is then worse by less than the margin, beyond chance.  Scores of other prompts, noise, base, chain or
    judges fail, and say what differs.
    """
    rules = []
    for judge, margin in config.gate.champion_margin.items():
        difference = candidate.chain_difference(champion) or candidate.judge_difference(champion, judge)
        metrics, fault = (None, difference) if difference else _compare(candidate, champion, (judge,), config)
        value = metrics["judges"][judge]["ci_low"] if metrics else None
        why = fault or f"not worse than the champion by {margin} or more"
        rules.append(_verdict(f"champion.{judge}.ci_low", judge, "ci_low", value, -margin, why))
    return rules


def markdown(record: Record) -> str:
    """The record as Markdown: the verdict, then a table of rules for each candidate."""
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


def judge_candidate(
    name: str, scores: Scores | None, base: Scores | None, config: Terms, unusable: Mapping[str, str] | None = None
) -> Record:
    """One candidate's record: {passed, digest, rules, heldout_judges, trained_weights, metrics}.

    config: the rules and the judges.  unusable: why the scores of the candidate or the base cannot be used.
    """
    if scores is None or base is None:
        missing = name if scores is None else BASE
        metrics, fault = None, (unusable or {}).get(missing) or _no_scores(missing)
        faults: dict[str, str] = {}
    elif difference := scores.chain_difference(base):
        metrics, fault, faults = None, difference, {}
    else:
        faults = _faults(scores, base, config)
        usable = tuple(judge for judge in config.evaluate.judges if judge not in faults)
        metrics, fault = (None, "") if DIVERSITY in faults else _compare(scores, base, usable, config)
    rules = [_apply(rule, metrics, fault or faults.get(rule.judge, "")) for rule in config.gate.rules]
    rules += [_require_held_out(judge, name, scores) for judge in config.evaluate.heldout_judges]
    if metrics is not None and config.gate.rank_by not in metrics["judges"]:
        # The candidate could pass, but not be ranked.
        why = faults.get(config.gate.rank_by, "gate.rank_by names a judge that is not among evaluate.judges")
        rules.append(_verdict(f"{config.gate.rank_by}.delta", config.gate.rank_by, "delta", None, None, why))
    return {
        "passed": metrics is not None and all(rule["passed"] for rule in rules),
        "digest": scores.digest if scores else None,
        "rules": rules,
        "heldout_judges": {judge: _judge_weights(judge, scores) for judge in config.evaluate.heldout_judges},
        "trained_weights": scores.proof.get("trained_weights") if scores else None,
        "metrics": metrics,
    }


def _require_held_out(judge: str, candidate: str, scores: Scores | None) -> Record:
    """The rule JUDGE.held_out: nothing that the candidate was trained on has the judge's name or weights."""
    fault = _no_scores(candidate) if scores is None else _trained_on_fault(judge, scores)
    why = fault or "no reward of the mix has this judge's name or weights"
    return _verdict(f"{judge}.held_out", judge, "held_out", 0.0 if fault else 1.0, 1.0, why)


def _trained_on_fault(judge: str, scores: Scores) -> str:
    """Why a judge does not count as held out for a candidate; empty if it does."""
    name, weights = judge.removesuffix(MATRIX), _judge_weights(judge, scores)
    trained = scores.proof.get("trained_weights")
    if trained is None:
        return f"the proof does not say which weights {scores.candidate} was trained on. Train and evaluate it again"
    if name in trained or name in scores.trained_on:
        return f"{scores.candidate} was trained on {name}"
    if weights is None:
        return "" if judge in ORACLE_JUDGES else f"the proof does not say which weights {judge} has. Evaluate again"
    rewards = {reward: Fingerprint.from_json(each) for reward, each in trained.items()}
    reward = same_weights(Fingerprint.from_json(weights), rewards)
    return f"{scores.candidate} was trained on {reward}, which has the weights of {name}" if reward else ""


def _judge_weights(judge: str, scores: Scores | None) -> Record | None:
    """The fingerprint of a judge's weights in the proof of the scores; None for the oracle, which has none."""
    weights: Record | None = scores.proof.get("judge_weights", {}).get(judge.removesuffix(MATRIX)) if scores else None
    return weights


def _no_scores(candidate: str) -> str:
    return f"{candidate} has no scores. Run `textcraftor evaluate --candidate {candidate}`"


def _faults(scores: Scores, base: Scores, config: Terms) -> dict[str, str]:
    """Why scores cannot be used, by judge."""
    faults = {}
    for judge in (*config.evaluate.judges, DIVERSITY):
        for side in (scores, base):
            if fault := score_fault(side.table, judge):
                faults[judge] = f"{side.candidate}: {fault}"
        if difference := scores.judge_difference(base, judge):
            faults[judge] = difference
    return faults


def _compare(scores: Scores, base: Scores, judges: tuple[str, ...], config: Terms) -> tuple[Record | None, str]:
    """(metrics, "") or (None, why there are none)."""
    try:
        metrics = compare(scores.table, base.table, judges, scores.trained_on, config.evaluate)
    except UserError as error:
        return None, str(error)
    prompts, least = metrics["n_prompts"], config.gate.min_prompts
    return (metrics, "") if prompts >= least else (None, f"too few prompts: {prompts}, need {least} (gate.min_prompts)")


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
