"""The summary of a run in the terminal: every candidate's scores, the verdict, where the picture is."""

import re
import sys
from pathlib import Path

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.deployments import arun_deployment
from prefect.states import Cancelled, State
from rich.console import Console
from rich.table import Table

from tasks.decision import Decision
from tasks.workspace import Workspace
from textcraftor.evaluate.figures import Row, claim_rows, headline, losses, read_claims, score_rows

PROMOTED, FAILED, NOT_PROMOTED = 0, 1, 3


async def print_summary(flow_run_name: str, log: Path) -> int:
    """Print scores, verdict, files and next commands of a run; return the exit status that says the same."""
    console = Console()
    console.width = max(console.width, 80)  # a log file has no width; the tables have
    async with get_client() as client:
        state = await _state(client, flow_run_name)
    if state is None or not state.is_completed():
        console.print(f"\n[bold]The run failed.[/bold] {_reason(state)}")
        console.print(f"Everything that it printed: {log}", soft_wrap=True)
        console.print("Run it again when that is mended; stages that are done are not repeated.")
        return FAILED
    decision = Decision.model_validate(await state.aresult())
    workspace = Workspace(Path(decision.folder))
    for candidate in workspace.config.candidates:
        print_figures(console, candidate, workspace)
    console.print(f"[bold]Verdict: {decision.verdict}[/bold]{describe(decision)}: {decision.why}")
    if decision.worse:
        console.print(decision.worse)
    shown = decision.candidate or workspace.config.candidates[0]
    console.print(f"Before and after: {workspace.report(shown) / 'grid.png'}", soft_wrap=True)
    console.print(f"The whole report: {workspace.report(shown) / 'report.html'}", soft_wrap=True)
    console.print(
        "Next:", *(f"  {line}" for line in next_commands(decision, shown, workspace)), sep="\n", highlight=False, soft_wrap=True
    )
    return NOT_PROMOTED if decision.verdict == "not promoted" else PROMOTED


def next_commands(decision: Decision, candidate: str, workspace: Workspace) -> list[str]:
    """Three commands that go on from a run's verdict, each with what it does."""
    model = "champion" if decision.verdict in ("promoted", "champion stays") else str(decision.version or candidate)
    params = "" if decision.version else f" --params {workspace.folder / 'params.yaml'}"
    commands = {
        "make ui": "both UIs",
        f'.venv/bin/textcraftor generate "a red star" --model {model}{params}': "draw with it",
        "make full PROMPTS=my_prompts.txt": "your prompts",
    }
    if decision.verdict == "challenger":
        del commands["make full PROMPTS=my_prompts.txt"]
        commands[f"make promote VERSION={decision.version}"] = "choose it"
    width = max(map(len, commands))
    return [f"{command:<{width}}   {what}" for command, what in commands.items()]


async def run_promotion(deployment: str, version: int) -> int:
    """Run the deployment that promotes a version, print its verdict, and return the exit status that says the same."""
    run = await arun_deployment(deployment, parameters={"version": version}, poll_interval=1, as_subflow=False)
    if run.state is None or not run.state.is_completed():
        print(f"textcraftor: {_reason(run.state)}", file=sys.stderr)
        return FAILED
    decision = Decision.model_validate(await run.state.aresult())
    print(f"Verdict: {decision.verdict}{describe(decision)}: {decision.why}")
    if decision.worse:
        print(decision.worse)
    return PROMOTED


async def cancel_run(flow_run_name: str) -> None:
    """Cancel a run whose processes are being ended, if it is still open."""
    named = FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
    async with get_client() as client:
        for run in await client.read_flow_runs(flow_run_filter=named):
            if run.state and not run.state.is_final():
                await client.set_flow_run_state(run.id, Cancelled(message="Its servers were stopped."), force=True)


async def _state(client: PrefectClient, flow_run_name: str) -> State | None:
    named = FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
    found = await client.read_flow_runs(flow_run_filter=named)
    return found[0].state if found else None


def _reason(state: State | None) -> str:
    """Why a run did not complete, in one line."""
    if state is None:
        return "it was never created"
    message = " ".join((state.message or state.name or "").split())
    return re.sub(r"^Flow run encountered an exception: \w+: ", "", message)


def describe(decision: Decision) -> str:
    """The candidate and its version, in parentheses; empty where there is none."""
    version = f", version {decision.version} in the registry" if decision.version else ""
    return f" ({decision.candidate}{version})" if decision.candidate else ""


def print_figures(console: Console, candidate: str, workspace: Workspace) -> None:
    """Scores and claims of base and candidate, and what they say in words."""
    metrics, claims = workspace.metrics(candidate), read_claims(candidate, workspace.folder)
    title = f"{candidate}: base against tuned, {metrics['n_prompts']} held-out prompts"
    console.print(_table(title, score_rows(metrics)))
    if claims:
        console.print()
        console.print(_table("claims of the prompts that hold", claim_rows(claims)))
    console.print(f"{candidate}: {headline(metrics, claims)}\n{losses(metrics, claims)}\n")


def _table(title: str, rows: list[Row]) -> Table:
    # Without lines, because the table of judges fits 80 columns so.
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("judge", "trained on", "claim") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table
