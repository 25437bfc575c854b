"""The process dies between any two steps of tracking, registering, challenging and promoting: the next run ends right."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks import promotions
from tasks import store as registry_store
from tasks.registry import challenge, promote
from tasks.versions import fetch
from tasks.workspace import Workspace
from tests.tasks.registered import MODEL, alias_holder, enter


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


# Each step that changes something in MLflow, in order: the call, and the how manieth it is of its name.
STEPS = [
    ("create_run", 1),
    ("set_tag", 1),
    ("create_logged_model", 1),
    ("log_inputs", 1),
    ("log_batch", 1),
    ("log_artifacts", 1),
    ("log_outputs", 1),
    ("finalize_logged_model", 1),
    ("set_terminated", 1),
    ("create_registered_model", 1),
    ("create_model_version", 1),
    ("set_model_version_tag", 1),  # compared with the champion, as challenger
    ("set_registered_model_alias", 1),
    ("set_model_version_tag", 2),  # and again before the promotion
    ("create_registered_model", 2),  # the record of promotions
    ("create_model_version", 2),  # its entry
    ("set_registered_model_alias", 2),
    ("delete_registered_model_alias", 1),
]


def run(workspace: Workspace) -> None:
    version = enter(workspace)
    if challenge.fn(version, workspace.config).verdict == "challenger":
        promote.fn(version, workspace.config)


@pytest.mark.parametrize(("call", "number"), STEPS)
def test_the_next_run_ends_right(
    tmp_path: Path, empty_store: Path, judged: dict[int, Path], monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(registry_store, "STORE", tmp_path / "store")
    monkeypatch.setattr(registry_store, "ROOT", judged[1].parent)
    workspace, store = Workspace(judged[200]), registry_store.client()
    seen: Counter[str] = Counter()

    def dying(name: str) -> Any:
        original = getattr(MlflowClient, name)

        def step(*arguments: Any, **options: Any) -> Any:
            seen[name] += 1
            if seen["dead"] or (name, seen[name]) == (call, number):
                seen["dead"] += 1
                raise Killed
            return original(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in {each for each, _ in STEPS}:
            patch.setattr(MlflowClient, name, dying(name))
        with pytest.raises(Killed):
            run(workspace)
    run(workspace)
    assert [entry.version for entry in promotions.read(store, MODEL).entries] == [1]
    assert len(store.search_model_versions(f"name = '{MODEL}'")) == 1
    assert (alias_holder(store, "champion"), alias_holder(store, "challenger")) == ("1", None)
    assert fetch("champion", workspace.config) == fetch("1", workspace.config)
    experiment = store.get_experiment_by_name(MODEL)
    assert experiment
    statuses = Counter(each.info.status for each in store.search_runs([experiment.experiment_id]))
    assert statuses["FINISHED"] == 1 and not statuses["RUNNING"]
