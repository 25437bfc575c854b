"""A checkout whose stages are toys: `python -m flows.local` and its servers run in it as in the real one, in seconds."""

import os
import shutil
from pathlib import Path

from tests.flows.project import ROOT, make_project


def make_checkout(folder: Path, **sections: object) -> Path:
    """A toy project with our flows, tasks and deployments, for the interpreter that runs the tests."""
    make_project(folder, **sections)
    for name in ("flows", "tasks", "mlflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "policy"), dirs_exist_ok=True)
    shutil.copy2(ROOT / "prefect.yaml", folder / "prefect.yaml")
    return folder


def shell_environment(**variables: str) -> dict[str, str]:
    """The environment of a fresh shell: none of the settings that a test's own server has put there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "PYTHON"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **variables}
