"""Where MLflow keeps this project's history: a server, or the store that `make full` left on this machine. No Prefect here."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from mlflow import MlflowClient

from tasks.environment import sqlite_url
from textcraftor.errors import UserError
from textcraftor.layout import STATE

ROOT = Path(__file__).resolve().parents[1]  # the project: its policies and keys
STORE = ROOT / STATE / "mlflow"  # MLflow's database and artifacts
ARTIFACT: Final = "candidate"  # the run's artifact folder that becomes a model version


class RegistryUnavailable(UserError):
    """MLflow or its artifact store cannot be read now: not reachable, locked, or a disk error. Trying again may help."""


def client() -> MlflowClient:
    """MLflow at MLFLOW_TRACKING_URI; without it, the store that `make full` left in this project, no server needed."""
    # A server that is down is reported within seconds, not after the default's four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return MlflowClient(tracking_uri())


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(STORE / "mlflow.db")


def without_credentials(text: str) -> str:
    """Text without the user and password in its URLs, for messages and links."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1", text)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; waits for other threads and processes. The kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder until the block ends, on the disk of the store: TMPDIR may be too small for weights."""
    STORE.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".scratch.", dir=STORE.parent) as folder:
        yield Path(folder)
