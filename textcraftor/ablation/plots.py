"""Plots of a table's record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from textcraftor.ablation.results import Record
from textcraftor.pictures import FAILS, HOLDS, INK, MUTED

COLOURS: Final = {"with": HOLDS, "without": FAILS, "base": MUTED}


def plot(record: Record, path: Path) -> None:
    """Write the plot of a table as PNG."""
    figure = _along_training(record) if record["table"] == "figure6" else _differences(record)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})  # equal figures, equal bytes


def judges_to_plot(record: Record) -> list[str]:
    """The held-out judges, or the first judge where there are none."""
    return list(record["heldout_judges"]) or list(record["rows"][0]["judges"])[:1]


def _differences(record: Record) -> Figure:
    """A panel for each held-out judge: the difference of each row from the base, with its 95 % interval."""
    rows, judges = [row for row in record["rows"] if not row["is_base"]], judges_to_plot(record)
    figure = Figure(figsize=(3.2 + 3.2 * len(judges), 1.2 + 0.34 * len(rows)), dpi=110, layout="constrained")
    panels: Any = figure.subplots(1, len(judges), sharey=True, squeeze=False)[0]
    for panel, judge in zip(panels, judges, strict=True):
        figures = [row["judges"][judge] for row in rows]
        deltas = [each["delta"] for each in figures]
        errors = [
            [each["delta"] - each["ci_low"] for each in figures],
            [each["ci_high"] - each["delta"] for each in figures],
        ]
        panel.errorbar(deltas, range(len(rows)), xerr=errors, fmt="o", color=INK, ecolor=MUTED, capsize=3, markersize=4)
        panel.axvline(0, color=MUTED, linewidth=0.8)
        panel.set_title(f"{judge}: difference from the base", fontsize=9, color=INK)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].invert_yaxis()
    return figure


def _along_training(record: Record) -> Figure:
    """The reward, the held-out judges and diversity against the training step, with and without the constraint."""
    base, *rows = record["rows"]
    reward = _trained_reward(rows)
    judges = list(dict.fromkeys([*([reward] if reward in base["judges"] else []), *judges_to_plot(record)]))
    figure = Figure(figsize=(3.4 * (len(judges) + 1), 3.2), dpi=110, layout="constrained")
    panels: Any = figure.subplots(1, len(judges) + 1, squeeze=False)[0]
    for constraint in ("with", "without"):
        line = [base, *(row for row in rows if row["facts"]["constraint"] == constraint)]
        steps, style = (
            [int(row["facts"]["steps"]) for row in line],
            {"color": COLOURS[constraint], "marker": "o", "markersize": 4},
        )
        for panel, judge in zip(panels, judges, strict=False):
            figures = [row["judges"][judge] for row in line]
            panel.plot(steps, [each["mean"] for each in figures], label=f"{constraint} the constraint", **style)
            low, high = ([each["base_mean"] + each[end] for each in figures] for end in ("ci_low", "ci_high"))
            panel.fill_between(steps, low, high, color=COLOURS[constraint], alpha=0.15, linewidth=0)
            if judge == reward and (history := line[-1]["history"]).get(reward):
                panel.plot(history["step"], history[reward], color=COLOURS[constraint], alpha=0.35, linewidth=0.8)
        panels[-1].plot(steps, [row["diversity"]["ratio"] or 0.0 for row in line], **style)
    for panel, title in zip(panels, [*map(_titled(reward), judges), "diversity, relative to the base"], strict=True):
        panel.set_title(title, fontsize=9, color=INK)
        panel.set_xlabel("training step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure


def _trained_reward(rows: Sequence[Record]) -> str:
    """The reward that is trained without the constraint: the one column of its history beside step and loss."""
    history: dict[str, list[float]] = next((row["history"] for row in reversed(rows) if row["history"]), {})
    trained_on = [name for name, judge in rows[-1]["judges"].items() if judge["trained_on"]]
    return next((name for name in history if name in trained_on), next(iter(trained_on), ""))


def _titled(reward: str) -> Any:
    return lambda judge: f"{judge}, trained on (thin: its batches)" if judge == reward else f"{judge}, held out"
