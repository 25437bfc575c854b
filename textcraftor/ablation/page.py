"""docs/ablations.md: a section for each table, between marks, so that each command rewrites its own section alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from textcraftor.ablation.results import Record
from textcraftor.ablation.rows import TABLES
from textcraftor.evaluate.figures import number
from textcraftor.evaluate.scores import DIVERSITY

INTRO: Final = """# Ablations

The paper's tables, measured on this project's own base, rewards and prompts. `textcraftor ablate table1` (or `table4`,
`table5`, `figure6`) writes a section of this page and its pictures; `dvc repro ablations/dvc.yaml` brings all of them up to
date. Both take up a stopped run where it was. The section `ablation` of the profile sets the budget.

A figure is a mean over held-out prompts; in brackets its difference from the base on the same prompts and noise, **bold** where
its 95 % interval excludes zero. A judge that the row was trained on has a °: its rise shows that training worked, not that the
pictures are better. Diversity is relative to the base's. One training is one draw: small differences between rows are chance.
"""


def section(record: Record, pictures: Sequence[tuple[str, str]]) -> str:
    """The Markdown section of a table, without its marks.

    pictures: (file in docs/ablations, what it shows).
    """
    table = TABLES[record["table"]]
    trained = any(row["training_seconds"] for row in record["rows"])
    budget = f"{record['steps']} optimiser steps of {record['images_per_step']} images; " if trained else ""
    settings = (
        f"Profile `{record['profile']}`, mix `{record['mix']}`; {budget}{record['prompts']} prompts, "
        f"{record['images_per_prompt']} images each."
    )
    command = (
        f"`textcraftor ablate {record['table']}`: {_minutes(record['seconds'])} of a processor, trainings and evaluations that "
        "other tables share included."
    )
    shown = [f"![{text}](ablations/{name})" for name, text in pictures]
    return "\n\n".join([f"## {table.title}", table.about, settings, command, markdown_table(record), *shown])


def markdown_table(record: Record) -> str:
    """A row for each evaluation: facts, the mean of each judge, diversity, and what its training took."""
    rows, judges = record["rows"], list(record["rows"][0]["judges"])
    ordered = sorted(judges, key=lambda name: name not in record["heldout_judges"])  # held-out ones first
    facts = list(rows[0]["facts"])
    head = [*facts, *(f"{name} (held out)" if name in record["heldout_judges"] else name for name in ordered), DIVERSITY]
    trained = any(row["training_seconds"] for row in rows)
    lines = [[*head, *(["training"] if trained else [])]]
    lines.append(["---"] * len(facts) + ["---:"] * (len(lines[0]) - len(facts)))
    for row in rows:
        cells = [row["facts"][name] for name in facts]
        cells += [_cell(row["judges"][name], row["is_base"]) for name in ordered]
        ratio = row["diversity"]["ratio"]
        cells.append("" if ratio is None else f"x {ratio:.2f}")
        lines.append([*cells, *([_minutes(row["training_seconds"]) if row["training_seconds"] else ""] if trained else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def insert(page: str, name: str, text: str) -> str:
    """The page with `text` as a table's section. Sections keep the order of TABLES; an empty page gets the introduction."""
    begin, end = _marks(name)
    whole = f"{begin}\n{text}\n{end}\n"
    if begin in page and end in page:
        before, rest = page.split(begin, 1)
        return before + whole + rest.split(end, 1)[1].removeprefix("\n")
    page = page or INTRO
    names = list(TABLES)
    for later in names[names.index(name) + 1 :]:
        if (mark := _marks(later)[0]) in page:
            before, rest = page.split(mark, 1)
            return f"{before}{whole}\n{mark}{rest}"
    return f"{page.rstrip()}\n\n{whole}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _cell(figures: Mapping[str, Any], is_base: bool) -> str:
    mean = number(figures["mean"], figures)
    if is_base:
        return mean
    difference = number(figures["delta"], figures, signed=True)
    sure = figures["ci_low"] > 0 or figures["ci_high"] < 0
    return f"{mean}{'°' if figures['trained_on'] else ''} ({f'**{difference}**' if sure else difference})"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
