"""Addresses of pages in MLflow's UI. It opens in a mode for language models, where neither runs nor registry are in sight."""

from urllib.parse import quote

WORKFLOW = "?workflowType=machine_learning"  # the other mode; the switch is at the top left of the UI


def runs_page(server: str, experiment: str | None) -> str:
    """The runs of an experiment, by its id; without, the list of experiments."""
    return f"{server}/#/experiments/{experiment}/runs{WORKFLOW}" if experiment else f"{server}/#/experiments{WORKFLOW}"


def model_page(server: str, model: str) -> str:
    """A registered model with its versions and aliases."""
    return f"{server}/#/models/{model}{WORKFLOW}"


def version_page(server: str, model: str, version: int) -> str:
    """A version of a registered model, with its card."""
    return f"{server}/#/models/{model}/versions/{version}{WORKFLOW}"


def report_page(experiment: str, run: str) -> str:
    """The report of a candidate's run, shown in MLflow's page of its files; relative to the server."""
    return f"/#/experiments/{experiment}/runs/{run}/artifacts/candidate/evidence/report.html{WORKFLOW}"


def evidence_file(run: str, name: str) -> str:
    """The bytes of a file of a candidate's evidence; relative to the server."""
    return f"/get-artifact?path={quote(f'candidate/evidence/{name}', safe='')}&run_uuid={run}"
