"""The summary of a run in the terminal: every candidate's scores, the verdict, where the picture is."""

from pathlib import Path

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from rich.console import Console
from rich.table import Table

from tasks.pages import score_rows
from tasks.registry import Decision
from tasks.workspace import Workspace

PROMOTED, FAILED, NOT_PROMOTED = 0, 1, 3


async def print_summary(flow_run_name: str) -> int:
    """Print scores, verdict and files of a run; return the exit status that says the same."""
    console = Console()
    console.width = max(console.width, 100)  # a log file has no width; the table has
    async with get_client() as client:
        found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name])))
        state = found[0].state if found else None
        if state is None or not state.is_completed():
            reason = " ".join((state.message or state.name or "").split()) if state else "it was never created"
            console.print(f"\n[bold]The run failed.[/bold] {reason.removeprefix('Flow run encountered an exception: ')}")
            return FAILED
        decision = Decision.model_validate(await state.aresult())
    workspace = Workspace(Path(decision.folder))
    for candidate in workspace.config.candidates:
        console.print(score_table(candidate, workspace))
    console.print(f"[bold]Verdict: {decision.verdict}[/bold]{describe(decision)}: {decision.why}")
    shown = decision.candidate or workspace.config.candidates[0]
    console.print(f"Before and after: {workspace.report(shown) / 'grid.png'}", soft_wrap=True)
    console.print(f"The whole report: {workspace.report(shown) / 'report.html'}", soft_wrap=True)
    return NOT_PROMOTED if decision.verdict == "not promoted" else PROMOTED


def describe(decision: Decision) -> str:
    """The candidate and its version, in parentheses; empty where there is none."""
    version = f", version {decision.version} in the registry" if decision.version else ""
    return f" ({decision.candidate}{version})" if decision.candidate else ""


def score_table(candidate: str, workspace: Workspace) -> Table:
    """Scores of base and candidate, one row for each judge."""
    rows = score_rows(workspace.metrics(candidate))
    table = Table(title=f"{candidate}: base against tuned, {workspace.metrics(candidate)['n_prompts']} held-out prompts")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("judge", "trained on") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table
