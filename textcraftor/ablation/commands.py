"""The verb `ablate`."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from textcraftor import config as configuration
from textcraftor import layout
from textcraftor.options import PARAMS, Device, Params, Profile

Name = Literal["table1", "table4", "table5", "figure6"]


def ablate(
    table: Annotated[Name, typer.Argument(help="Which of the paper's tables.")],
    jobs: Annotated[int, typer.Option(min=1, help="Trainings and evaluations at a time.")] = 1,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Measure one of the paper's tables with this run's base, rewards and prompts, and write it to docs/ablations.md.

    Runs the pipeline's verbs in workspaces of their own. Ctrl-C stops it, and the same command takes it up again. The
    section `ablation` of the configuration sets the budget.
    """
    signal.signal(signal.SIGTERM, _end)
    written = configuration.written(params, profile)
    try:
        typer.echo(write_table(table, written, params.parent, jobs, device))
    except KeyboardInterrupt:
        typer.echo(f"textcraftor: stopped. `textcraftor ablate {table}` takes it up again", err=True)
        raise typer.Exit(130) from None


def write_table(table: Name, written: dict[str, Any], root: Path, jobs: int, device: str) -> Path:
    """Run what is not done yet, and write docs/ablations/TABLE and its section of docs/ablations.md; returns the page.

    written: as a params.yaml in `root` holds it.
    """
    from rich.console import Console

    from textcraftor.ablation import page, plots
    from textcraftor.ablation.jobs import Runner
    from textcraftor.ablation.plan import Planner
    from textcraftor.ablation.results import RECORD, record
    from textcraftor.ablation.rows import TABLES
    from textcraftor.artifact import write_json, written_aside
    from textcraftor.device import choose_device

    config = configuration.resolve(written, root)
    chosen = choose_device(device, config.cpu_threads)
    planned = Planner(written, root).plan(TABLES[table].rows(config))
    Runner(written, jobs, device, Console(stderr=True)).run(table, planned)
    found = record(table, planned, config)
    shown = [(f"{table}/plot.png", TABLES[table].title)]
    with written_aside(root / layout.ABLATIONS / table) as aside:
        aside.mkdir()
        write_json(aside / RECORD, found)
        plots.plot(found, aside / "plot.png")
        if table in ("table1", "figure6"):  # their rows are all sampled alike
            from textcraftor import pictures
            from textcraftor.ablation.drawing import draw

            labels = {each.row.label.removesuffix(", text encoder"): each.weights for each in planned}
            pictures.save(draw(config, labels, root, chosen), aside / "pictures.png")
            shown.append((f"{table}/pictures.png", "The first held-out prompts, a row for each model"))
    path = root / layout.ABLATIONS_PAGE
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with written_aside(path) as aside:
        aside.write_text(page.insert(before, table, page.section(found, shown)), encoding="utf-8")
    return path


def _end(*_: object) -> None:
    sys.exit(75)  # as a preempted training does: run it again, it resumes
