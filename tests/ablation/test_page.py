"""The page of ablations, from made-up records."""

from pathlib import Path
from typing import Any

from PIL import Image

from textcraftor.ablation import page, plots


def judge(mean: float, delta: float, spread: float = 0.1, trained_on: bool = False) -> dict[str, Any]:
    ends = {"ci_low": delta - spread, "ci_high": delta + spread}
    return {"mean": mean, "base_mean": mean - delta, "delta": delta, **ends, "win_rate": 0.5, "trained_on": trained_on}


def row(label: str, oracle: dict[str, Any], aesthetic: dict[str, Any], seconds: int = 0, **facts: str) -> dict[str, Any]:
    return {
        "label": label,
        "facts": {"tuned": label, **facts},
        "is_base": label == "base",
        "prompts": 8,
        "judges": {"aesthetic": aesthetic, "oracle": oracle},
        "diversity": {"ratio": 0.912},
        "training_seconds": seconds,
        "history": {"step": [1.0, 2.0], "aesthetic": [5.0, 6.0]} if seconds else {},
    }


def record(table: str, *rows: dict[str, Any]) -> dict[str, Any]:
    budget = {"steps": 80, "images_per_step": 12, "prompts": 8, "images_per_prompt": 2, "seconds": 1234}
    return {"table": table, "profile": "tiny", "mix": "balanced", **budget, "heldout_judges": ["oracle"], "rows": list(rows)}


BASE = row("base", judge(0.5, 0), judge(5, 0))
BETTER = row("text", judge(0.7, 0.2), judge(6, 0.05, trained_on=True), 200)


def test_a_table_has_means_differences_and_what_they_are_worth() -> None:
    text = page.section(record("table1", BASE, BETTER), [("table1/plot.png", "differences")])
    assert "| tuned | oracle (held out) | aesthetic | diversity | training |" in text
    assert "| base | 0.500 | 5.00 | x 0.91 |  |" in text
    assert "| text | 0.700 (**+0.200**) | 6.00° (+0.05) | x 0.91 | 3 min |" in text
    assert "`textcraftor ablate table1`: 21 min of a processor" in text and "80 optimiser steps of 12 images" in text
    assert "![differences](ablations/table1/plot.png)" in text


def test_an_evaluation_alone_has_no_budget_and_no_column_of_it() -> None:
    text = page.section(record("table5", BASE, {**BETTER, "training_seconds": 0}), [])
    assert "optimiser steps" not in text and "| diversity |\n" in text


def test_each_command_writes_its_own_section_in_the_papers_order() -> None:
    made = ""
    for name in ("table4", "table1", "figure6", "table5"):
        made = page.insert(made, name, f"## {name}")
    assert made.startswith(page.INTRO)
    assert [line for line in made.splitlines() if line.startswith("## ")] == [
        "## table1",
        "## table4",
        "## table5",
        "## figure6",
    ]
    edited = made.replace("# Ablations", "# Ablations of ours")
    again = page.insert(edited, "table4", "## table4 again")
    assert again == edited.replace("## table4", "## table4 again")


def test_plots_are_pictures_with_the_same_bytes_again(tmp_path: Path) -> None:
    along = [
        row(f"{each}, {steps}", judge(0.6, 0.1), judge(6, 1, trained_on=True), 9, constraint=each, steps=str(steps))
        for each in ("with", "without")
        for steps in (1, 2)
    ]
    base = row("base", judge(0.5, 0), judge(5, 0), constraint="base", steps="0")
    made = {
        "one": record("table1", BASE, BETTER),
        "two": record("table1", BASE, BETTER),
        "six": record("figure6", base, *along),
    }
    for name, each in made.items():
        plots.plot(each, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 150
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
