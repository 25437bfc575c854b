"""Who is champion when the present one cannot be read, and when several promotions meet."""

import json
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import requests
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
from prefect.states import Failed
from sqlalchemy import Engine, event

from tasks import promotions
from tasks import store as registry_store
from tasks.registry import challenge, promote
from tasks.store import RegistryUnavailable
from tasks.tracking import only_if_unavailable
from tasks.versions import fetch, fetch_proven
from tasks.workspace import Workspace
from tests.tasks.registered import CHAMPION, MODEL, WORSE, alias_holder, enter
from textcraftor.config import Config
from textcraftor.errors import Unproven


def stored(store: MlflowClient, version: int = CHAMPION) -> Path:
    """The folder of a version's artifacts in MLflow's store."""
    source = store.get_model_version(MODEL, str(version)).source
    assert source
    return Path(source.removeprefix("file://"))


def _without_metadata(path: Path) -> None:
    parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _without_signatures(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "signatures": []}))


SIGNED = "its files are not the ones that were signed: "
GATE, SCORES, STATEMENT = "evidence/gate.json", "evidence/scores.parquet", "statement.dsse.json"
RUINS: dict[str, tuple[Callable[[Path], object], str]] = {
    "all artifacts gone": (shutil.rmtree, "its artifacts are gone"),
    "weights gone": (lambda folder: shutil.rmtree(folder / "text_encoder"), SIGNED + "text_encoder/config.json"),
    "weights changed": (
        lambda folder: (folder / "text_encoder/model.safetensors").write_text("?"),
        SIGNED + "text_encoder/model",
    ),
    "no gate record": (lambda folder: (folder / GATE).unlink(), SIGNED + GATE),
    "gate record cut off": (lambda folder: _truncate(folder / GATE), SIGNED + GATE),
    "scores gone": (lambda folder: (folder / SCORES).unlink(), SIGNED + SCORES),
    "scores without metadata": (lambda folder: _without_metadata(folder / SCORES), SIGNED + SCORES),
    "a file more": (lambda folder: (folder / "evidence/more.json").write_text("{}"), SIGNED + "evidence/more.json"),
    "a script": (lambda folder: (folder / "run.py").write_text("exit()"), "run.py does not belong to a candidate"),
    "no statement": (lambda folder: (folder / STATEMENT).unlink(), "it has no signed statement"),
    "statement cut off": (lambda folder: _truncate(folder / STATEMENT), "its signed statement is damaged"),
    "statement not UTF-8": (lambda folder: (folder / STATEMENT).write_bytes(b"\xff"), "its signed statement is damaged"),
    "statement a list": (lambda folder: (folder / STATEMENT).write_text("[]"), "its signed statement is damaged"),
    "statement not signed": (lambda folder: _without_signatures(folder / STATEMENT), "it is not signed"),
}


@pytest.mark.parametrize("ruin", RUINS)
def test_only_a_person_replaces_a_champion_that_is_damaged(store: MlflowClient, config: Config, ruin: str) -> None:
    damage, reason = RUINS[ruin]
    damage(stored(store))
    shutil.rmtree(registry_store.STORE.parent / "models", ignore_errors=True)
    challenged = challenge.fn(WORSE, config)
    assert challenged.verdict == "challenger" and "version 1, is not proven: " in challenged.why and reason in challenged.why
    refused = promote.fn(WORSE, config)
    assert refused.verdict == "not promoted" and reason in refused.why and "make promote VERSION=N" in refused.why
    with pytest.raises(Unproven, match="make promote VERSION=N"):
        fetch("champion", config)
    promoted = promote.fn(WORSE, config, by="somebody")
    assert promoted.verdict == "promoted" and "version 1, which is not proven: " in promoted.why and reason in promoted.why
    assert alias_holder(store, "champion") == str(WORSE)


def _delete_and_gc_run(store: MlflowClient, home: Path) -> None:
    run_id = store.get_model_version(MODEL, str(CHAMPION)).run_id
    assert run_id
    store.delete_run(run_id)
    arguments = ["--backend-store-uri", registry_store.tracking_uri(), "--run-ids", run_id]
    from mlflow import cli  # takes a second to import

    collected = CliRunner().invoke(cli.gc, arguments)
    assert collected.exit_code == 0, collected.output
    with pytest.raises(MlflowException, match="not found"):
        store.get_run(run_id)


def _in_database(statement: str) -> Callable[[MlflowClient, Path], None]:
    def execute(store: MlflowClient, home: Path) -> None:
        with sqlite3.connect(home / "mlflow.db", timeout=10) as database:
            assert database.execute(statement).rowcount == 1

    return execute


@pytest.mark.parametrize(
    ("ruin", "reason"),
    [
        (_delete_and_gc_run, "its artifacts are gone"),
        (
            _in_database(
                "UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE name = 'textcraftor-tiny' AND version = 1"
            ),
            "has no version 1",
        ),
        (
            _in_database(
                "UPDATE model_versions SET run_id = NULL, source = NULL WHERE name = 'textcraftor-tiny' AND version = 1"
            ),
            "the pipeline did not register it",
        ),
        (
            _in_database(
                "UPDATE model_versions SET run_id = 'REDACTED-RUN-ID' WHERE name = 'textcraftor-tiny' AND version = 1"
            ),
            "its artifacts are gone",
        ),
        (
            _in_database("UPDATE model_version_tags SET value = 'x' WHERE key = 'statement' AND version = 1"),
            "is not the one",
        ),
    ],
    ids=["run deleted and gc'd", "version deleted, alias left", "no run", "run unknown", "registered as something else"],
)
def test_nor_is_one_replaced_that_is_broken_in_mlflow(
    two_versions: tuple[Path, dict[int, Workspace]],
    store: MlflowClient,
    config: Config,
    ruin: Callable[[MlflowClient, Path], None],
    reason: str,
) -> None:
    home, workspaces = two_versions
    ruin(store, home)
    shutil.rmtree(home / "models", ignore_errors=True)
    refused = promote.fn(WORSE, config)
    assert refused.verdict == "not promoted" and reason in refused.why
    promoted = promote.fn(WORSE, config, by="somebody")
    assert promoted.verdict == "promoted" and reason in promoted.why
    assert alias_holder(store, "champion") == str(WORSE)
    # The old champion's own candidate is not lost: it becomes a version again, and wins.
    again = enter(workspaces[300])
    assert again > WORSE and promote.fn(again, config).verdict == "promoted"


def test_a_damaged_download_is_replaced_and_says_nothing_about_the_champion(store: MlflowClient, config: Config) -> None:
    _truncate(fetch("champion", config) / "evidence/scores.parquet")
    assert promote.fn(WORSE, config).verdict == "not promoted"
    shutil.rmtree(stored(store))
    assert promote.fn(WORSE, config).verdict == "not promoted"  # the download is still a proven champion


def _http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Server Error", response=response)


LOCKED = MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("search_model_versions", LOCKED),
        ("get_model_version", LOCKED),
        ("download_artifacts", LOCKED),
        ("download_artifacts", MlflowException("failures occurred: ConnectionError('reset')", INTERNAL_ERROR)),
        ("list_artifacts", MlflowException("API request to http://127.0.0.1:1/api failed: refused", INTERNAL_ERROR)),
        ("list_artifacts", _http_error(503)),
        ("list_artifacts", requests.ConnectionError("Connection reset by peer")),
        ("list_artifacts", PermissionError(13, "Permission denied")),
        ("list_artifacts", OSError(5, "Input/output error")),
        ("download_artifacts", OSError(28, "No space left on device")),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_a_champion_that_cannot_be_read_now_is_not_replaced(
    store: MlflowClient, config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
) -> None:
    shutil.rmtree(registry_store.STORE.parent / "models")
    fetch(str(WORSE), config)  # so that only the champion is missing
    original = getattr(MlflowClient, call)
    champion = store.get_model_version(MODEL, str(CHAMPION))

    def fail(self: MlflowClient, name: str, *arguments: str) -> object:
        if call == "search_model_versions" or name == champion.run_id or arguments == (str(CHAMPION),):
            raise error
        return original(self, name, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, call, fail)
        for task in (challenge, promote):
            with pytest.raises(RegistryUnavailable, match="Try again") as raised:
                task.fn(WORSE, config)
            assert only_if_unavailable(None, None, Failed(data=raised.value))
    assert alias_holder(store, "champion") == str(CHAMPION)
    assert promote.fn(WORSE, config).verdict == "not promoted"


def test_a_locked_database_is_retried(
    two_versions: tuple[Path, dict[int, Workspace]], store: MlflowClient, config: Config
) -> None:
    def give_up_soon(*arguments: Any) -> tuple[str, Any]:
        _, _, statement, parameters, *_ = arguments
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), parameters  # ms; MLflow waits for 20 s

    home, _ = two_versions
    blocker = sqlite3.connect(home / "mlflow.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    event.listen(Engine, "before_cursor_execute", give_up_soon, retval=True)
    try:
        with pytest.raises(RegistryUnavailable, match="locked") as raised:
            promote.fn(WORSE, config)
        assert only_if_unavailable(None, None, Failed(data=raised.value))
    finally:
        event.remove(Engine, "before_cursor_execute", give_up_soon)
        blocker.close()
    assert promote.fn(WORSE, config).verdict == "not promoted"


def after_comparing(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Call `act(version)` when a version was compared with the champion, before it takes the alias."""
    set_tag = MlflowClient.set_model_version_tag

    def set_tag_and_act(self: MlflowClient, model: str, version: str, key: str, value: str) -> None:
        set_tag(self, model, version, key, value)
        act(version)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", set_tag_and_act)


def test_promotions_of_a_project_wait_for_each_other(
    before: MlflowClient, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worse version finds no champion. Before it takes the alias, the better one is promoted by another thread."""
    compared, go_on = threading.Event(), threading.Event()

    def pause(version: str) -> None:
        if version == str(WORSE):
            compared.set()
            assert go_on.wait(60)

    after_comparing(monkeypatch, pause)
    verdicts: dict[int, str] = {}

    def run(version: int) -> None:
        verdicts[version] = promote.fn(version, config).verdict

    threads = {version: threading.Thread(target=run, args=(version,)) for version in (WORSE, CHAMPION)}
    threads[WORSE].start()
    assert compared.wait(60)
    threads[CHAMPION].start()
    threads[CHAMPION].join(1)  # without a lock it gets through meanwhile
    go_on.set()
    for thread in threads.values():
        thread.join(60)
    assert alias_holder(before, "champion") == str(CHAMPION)
    assert verdicts == {WORSE: "promoted", CHAMPION: "promoted"}


def test_a_champion_that_another_machine_promotes_meanwhile_is_compared_with(
    before: MlflowClient, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other machines do not take our lock. Their entry comes first, so ours does not count."""
    other = fetch_proven(str(CHAMPION), config)

    def promote_elsewhere(_: str) -> None:
        monkeypatch.undo()
        assert promotions.append(before, promotions.read(before, MODEL), MODEL, CHAMPION, other.digest, "another", "machine")

    after_comparing(monkeypatch, promote_elsewhere)
    decision = promote.fn(WORSE, config)
    assert decision.verdict == "not promoted" and "champion.oracle" in decision.why
    assert alias_holder(before, "champion") == str(CHAMPION)
    assert [entry.version for entry in promotions.read(before, MODEL).entries] == [CHAMPION]
