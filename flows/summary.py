"""How a run ended, in the terminal: the figures of every candidate, the verdict, the picture."""

from pathlib import Path

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from rich.console import Console
from rich.table import Table

from tasks.pages import score_rows
from tasks.registry import Decision
from tasks.workspace import Workspace

PROMOTED, FAILED, NOT_PROMOTED = 0, 1, 3


async def tell(flow_run_name: str) -> int:
    """Print what came of a run and return the exit status that says the same."""
    console = Console()
    console.width = max(console.width, 100)  # a log file has no width; the table has
    async with get_client() as client:
        found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name])))
        state = found[0].state if found else None
        if state is None or not state.is_completed():
            reason = " ".join((state.message or state.name).split()) if state else "it was never created"
            console.print(f"\n[bold]The run failed.[/bold] {reason.removeprefix('Flow run encountered an exception: ')}")
            return FAILED
        decision = Decision.model_validate(await state.aresult())
    workspace = Workspace(Path(decision.folder))
    for candidate in workspace.config.candidates:
        console.print(score_table(candidate, workspace))
    console.print(f"[bold]Verdict: {decision.verdict}[/bold]{of(decision)}: {decision.why}")
    shown = decision.candidate or workspace.config.candidates[0]
    console.print(f"Before and after: {workspace.report(shown) / 'grid.png'}", soft_wrap=True)
    console.print(f"The whole report: {workspace.report(shown) / 'report.html'}", soft_wrap=True)
    return NOT_PROMOTED if decision.verdict == "not promoted" else PROMOTED


def of(decision: Decision) -> str:
    """What the verdict is about, in words."""
    version = f", version {decision.version} in the registry" if decision.version else ""
    return f" ({decision.candidate}{version})" if decision.candidate else ""


def score_table(candidate: str, workspace: Workspace) -> Table:
    """Base against tuned, a row a judge."""
    rows = score_rows(workspace.metrics(candidate))
    table = Table(title=f"{candidate}: base against tuned, {workspace.metrics(candidate)['n_prompts']} held-out prompts")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("judge", "trained on") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table
