"""Artifacts of a run in Prefect's UI: pictures, scores, the verdict."""

import base64
import io
from pathlib import Path

import PIL.Image
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.decision import Decision
from tasks.gate import Verdict, figure
from tasks.workspace import Workspace
from textcraftor.evaluate.figures import claim_rows, headline, losses, read_claims, score_rows

WIDTH = 1200  # pixels; pictures are stored in Prefect's database


def show_candidate(name: str, workspace: Workspace) -> None:
    """Show a candidate's metrics as a table and its grid (base and tuned model on the same noise) as a picture."""
    key = name.replace("_", "-")
    metrics, claims = workspace.metrics(name), read_claims(name, workspace.folder)
    description = f"{name} against the base. {headline(metrics, claims)} {losses(metrics, claims)}"
    create_table_artifact(score_rows(metrics), key=f"scores-{key}", description=description)
    if claims:
        create_table_artifact(claim_rows(claims), key=f"claims-{key}", description=f"{name}: claims of the prompts that hold")
    grid = workspace.report(name) / "grid.png"
    create_markdown_artifact(
        f"# {name}: before and after, on the same noise\n\n![base and tuned model]({data_uri(grid)})\n\n"
        f"The whole report: `{workspace.report(name) / 'report.html'}`",
        key=f"grid-{key}",
        description=f"{name}: base and tuned, same prompts, same noise",
    )


def show_decision(decision: Decision, verdict: Verdict, workspace: Workspace) -> None:
    """Show each candidate's gate rules, the decision about the winner, and a link to its version in MLflow."""
    lines = [f"# {decision.verdict}", "", decision.why, ""]
    for name, record in verdict.records.items():
        lines += [
            f"## {name}: {'passed' if record['passed'] else 'did not pass'}",
            "",
            losses(workspace.metrics(name), read_claims(name, workspace.folder)),
            "",
            # Prefect's cells do not wrap: on a phone there is room for these three, and the reasons follow as a list.
            "| rule | value | at least |",
            "|---|---|---|",
            *(f"| {rule['rule']} | {figure(rule['value'])} | {figure(rule['bound'])} |" for rule in record["rules"]),
            "",
        ]
        for rule in record["rules"]:
            lines.append(f"- {rule['rule']}: {'passed' if rule['passed'] else '**not passed**'}: {rule['why']}")
        lines.append("")
    create_markdown_artifact("\n".join(lines), key="verdict", description=decision.verdict)
    if decision.page:
        create_link_artifact(
            decision.page,
            f"{workspace.config.registry.name}, version {decision.version}",
            key="model-version",
            description=f"the page of version {decision.version} in MLflow, with its card",
        )


def data_uri(picture: Path) -> str:
    """A picture as a data URI, at most WIDTH pixels wide."""
    with PIL.Image.open(picture) as opened:
        image = opened.convert("RGB")
        image.thumbnail((WIDTH, WIDTH * 4))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
