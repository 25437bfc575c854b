"""What the terminal shows of a run: a line a stage, its progress and the time left."""

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow, get_client, task
from prefect.logging import get_run_logger
from rich.console import Console

from flows.summary import next_commands, print_figures
from flows.terminal import RunView, Stage, Terminal, duration
from tasks.decision import Decision
from tasks.workspace import Workspace
from tests.flows.project import ROOT

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@task(task_run_name="{stage}")
def repro(stage: str, lines: list[str]) -> None:
    for line in lines:
        get_run_logger().info(line)
    if "fail" in lines:
        raise ValueError


@task
def track() -> None: ...


@flow(flow_run_name="seen-in-the-terminal")
def run() -> None:
    repro("curate", ["Running stage 'curate':", "12 prompts read"])
    repro("prepare", ["Stage 'prepare' didn't change, skipping"])
    track()
    repro("train@a", ["Running stage 'train@a':", "step: 3/12", "fail"])


def line(message: str, seconds: float) -> Any:
    return SimpleNamespace(message=message, timestamp=NOW + timedelta(seconds=seconds))


def test_each_stage_is_a_line_once_and_nothing_else_is_shown(server: None) -> None:
    with pytest.raises(ValueError):
        run()
    stream = io.StringIO()
    with (
        get_client(sync_client=True) as client,
        Terminal(RunView(client, "seen-in-the-terminal"), Console(file=stream, width=60)) as terminal,
    ):
        terminal.show()
        terminal.finish()
        terminal.show()
    shown = [printed.split()[:2] for printed in stream.getvalue().splitlines()]
    assert shown == [["curate", "ran"], ["prepare", "unchanged"], ["train@a", "failed"]]


def test_a_running_stage_says_how_far_it_is_and_what_is_left() -> None:
    stage = Stage("evaluate@a", "RUNNING", started=NOW, seconds=20)
    assert stage.describe().split() == ["evaluate@a", "...", "20", "s"]
    for read in (line("Running stage 'evaluate@a':", 1), line("generate images: 25/100", 20)):
        stage.read(read)
    assert stage.describe().split() == ["evaluate@a", "generate", "images", "25/100", "20", "s", "60", "s", "left"]
    stage.seconds = 300
    for read in (line("judge: clip: 10/100", 280), line("judge: clip: 50/100", 300)):
        stage.read(read)
    assert stage.describe().split() == ["evaluate@a", "judge:", "clip", "50/100", "5", "min", "20", "s", "left"]


def test_on_a_terminal_ended_stages_are_printed_once_and_the_running_ones_stay_in_sight() -> None:
    ended = [Stage(f"train@mix-{n}", "COMPLETED", NOW, 5, ["Finished in state Completed()"]) for n in range(20)]
    running = Stage(
        "evaluate@a-mix-with-a-long-name", "RUNNING", NOW, 40_000, counter=("judge: oracle_diversity", NOW, 1, 1024)
    )
    view: Any = SimpleNamespace(begun=[*ended, running], waiting=False, review="", refresh=lambda: None)
    stream = io.StringIO()
    with Terminal(view, Console(file=stream, force_terminal=True, width=80, height=10)) as terminal:
        terminal.show()
        terminal.show()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()))
    assert [line.split()[0] for line in lines if line.startswith("train@")] == [stage.name for stage in ended]
    assert any("judge: oracle_diversity 1/1,024" in line for line in lines)
    assert max(map(len, lines)) <= 80, "a line that the terminal breaks in two is redrawn in the wrong place"


def test_a_run_that_waits_for_a_review_says_where_once() -> None:
    stream, page = io.StringIO(), "http://127.0.0.1:4200/runs/flow-run/7"
    view: Any = SimpleNamespace(begun=[], waiting=False, review=page, refresh=lambda: None)
    terminal = Terminal(view, Console(file=stream, width=60))
    for _ in range(2):
        terminal.show()
    assert stream.getvalue() == f"A person decides, in the form behind Resume:\n{page}\n"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5000, "83 min"), (11100, "3 h 05")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("verdict", "version", "commands"),
    [
        ("promoted", 3, ["--model champion", "PROMPTS="]),
        ("challenger", 3, ["--model 3", "make promote VERSION=3"]),
        ("not promoted", None, ["--model balanced --params", "PROMPTS="]),
    ],
)
def test_three_commands_go_on_from_each_verdict(verdict: Any, version: int | None, commands: list[str]) -> None:
    lines = next_commands(Decision(verdict=verdict, why="", version=version), "balanced", Workspace(ROOT))
    assert len(lines) == 3 and lines[0].startswith("make ui")
    assert not version or max(map(len, lines)) <= 78, "two columns to the left, and a terminal has 80"
    assert all(command in said for command, said in zip(commands, lines[1:], strict=True))


def test_the_tables_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """The widest rows that our profile has, as README shows them."""
    figures = {"mean": 16.887, "base_mean": 12.975, "delta": 3.912, "ci_low": -3.542, "ci_high": 4.291, "win_rate": 1.0}
    judges = {name: {**figures, "trained_on": False} for name in ("aesthetic", "oracle_diversity")}
    metrics = {"n_prompts": 256, "judges": judges, "diversity": {**figures, "ratio": 0.953}}
    folder = tmp_path / "data/reports/balanced"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    stream = io.StringIO()
    print_figures(Console(file=stream, width=80), "balanced", Workspace(tmp_path))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("balanced: base against tuned") and lines[1].split()[0] == "judge"
    assert re.fullmatch(r"oracle_diversity +no +\S+ +\S+ +\S+ +\S+ \.\. \S+ +100%", lines[3]), lines[3]
