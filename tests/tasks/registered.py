"""Helpers of the registry's tests."""

from mlflow import MlflowClient

from tasks.gate import read_verdict
from tasks.registry import register
from tasks.tracking import track
from tasks.workspace import Workspace

MODEL = "textcraftor-tiny"
CHAMPION, WORSE = 1, 2  # versions of the fixture `before`, in the order they are registered


def enter(workspace: Workspace) -> int:
    """Track and register the workspace's candidate; its version."""
    record = read_verdict.fn(workspace).records["balanced"]
    return register.fn("balanced", track.fn("balanced", record, workspace).run_id, record, workspace)


def alias_holder(store: MlflowClient, alias: str) -> str | None:
    """The version with an alias."""
    version = store.get_registered_model(MODEL).aliases.get(alias)
    return None if version is None else str(version)
