"""A project in a folder with an odd name, behind a symbolic link, or that cannot be written; and a small TMPDIR.

The walk in tests/flows/test_readme.py happens in a folder with most of these signs in its name, with servers and all.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from dvc.repo import Repo
from prefect.logging import disable_run_logger
from sqlalchemy import create_engine, text

from flows.deploy import flow_command
from flows.environment import environment, require_usable_folder, shell_lines
from flows.ports import choose_ports
from tasks import store
from tasks.environment import sqlite_url
from tasks.variants import open_workspace
from tests.flows.checkout import make_checkout, shell_environment
from tests.flows.project import make_project
from textcraftor.errors import ConfigError

NAMES = (
    *("with spaces", "a%2Fb", "100%", "what?", "hash#1", "Größe 日本", 'it\'s "quoted"', "a;b&c=d", "[x]*{y}"),
    *("back\\slash", "~", "$HOME", "a@b", "-rf", "`id`"),
)
UNUSABLE = {
    "a:b": "holds ':', which separates the entries of PATH",
    "a{{b}}": "holds '{{', which begins a placeholder",
    "a\nb": "which ends a line",
    os.fsdecode(b"a\xffb"): "is not UTF-8",
}
PACKAGE = Path(__file__).parents[2] / "textcraftor"


@pytest.fixture(params=[*NAMES, "behind a link"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a project may lie; in the last case its real name is one of the odd ones."""
    if request.param == "behind a link":
        (tmp_path / NAMES[3]).mkdir()
        (tmp_path / "link").symlink_to(tmp_path / NAMES[3])
        return tmp_path / "link"
    (tmp_path / request.param).mkdir()
    return tmp_path / request.param


def test_a_database_is_opened_where_it_is_meant_to_lie(folder: Path) -> None:
    with create_engine(sqlite_url(folder / "one.db")).begin() as connection:
        connection.execute(text("create table t (x int)"))
    assert [path for path in folder.parent.rglob("*") if path.is_file()] in ([folder / "one.db"], [folder.resolve() / "one.db"])


def test_the_store_is_read_and_written_without_a_server(
    folder: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "STORE", folder)
    shutil.copyfile(empty_store, folder / "mlflow.db")
    client = store.client()
    run = client.create_run(client.create_experiment("m", artifact_location=(folder / "artifacts").as_uri()))
    with store.scratch() as scratch:
        assert scratch.is_relative_to(folder.parent)
        (scratch / "weights").write_text("w")
        client.log_artifacts(run.info.run_id, str(scratch), "candidate")
        assert [entry.path for entry in client.list_artifacts(run.info.run_id, "candidate")] == ["candidate/weights"]
        fetched = client.download_artifacts(run.info.run_id, "candidate", str(scratch))
        assert (Path(fetched) / "weights").read_text() == "w"
    assert (folder / "artifacts" / run.info.run_id / "artifacts/candidate/weights").exists()


def test_a_second_shell_and_the_worker_find_their_programs(folder: Path) -> None:
    made = environment(folder, folder / ".textcraftor", choose_ports({}))
    (folder / "env").write_text(shell_lines(made))
    script = f'. {shlex.quote(str(folder / "env"))}; printf %s "$PREFECT_HOME"'
    sourced = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert Path(sourced.stdout) == folder / ".textcraftor/prefect"
    python = folder / "bin/python"
    assert shlex.split(flow_command(str(python))) == [str(python), "-m", "prefect.engine"]


@pytest.mark.parametrize("folder", [NAMES[1] + NAMES[3] + NAMES[4] + NAMES[5], "behind a link"], indirect=True)
def test_a_variant_of_the_project_uses_its_cache(folder: Path) -> None:
    project = make_project(folder / "project")
    with disable_run_logger():
        variant = open_workspace.fn(project, mixes=["aesthetic"]).folder
    with Repo(str(variant.resolve())) as repo:
        assert Path(repo.cache.local_cache_dir).is_relative_to((project / ".dvc/cache").resolve())


@pytest.mark.parametrize(("name", "said"), UNUSABLE.items(), ids=["colon", "braces", "newline", "latin-1"])
def test_what_no_program_gets_across_is_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as error:
        require_usable_folder(tmp_path / name, tmp_path / name / ".textcraftor")
    assert said in str(error.value) and "\n" not in str(error.value) and "Rename the folder" in str(error.value)


def read_only(folder: Path) -> list[str]:
    """Begin a command with this, and it cannot write to `folder`. Permissions do not stop root, a mount does."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        return []
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, str(folder)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root may not make a read-only mount here")
    return prefix


@pytest.mark.parametrize("there", [False, True], ids=["new", "used before"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(there: bool, tmp_path: Path) -> None:
    folder = make_checkout(tmp_path / "checkout")
    if there:
        (folder / ".textcraftor/prefect/ui").mkdir(parents=True)
        (folder / ".textcraftor").chmod(0o555)
    command = [*read_only(folder), sys.executable, "-m", "flows.local", "full"]
    done = subprocess.run(command, cwd=folder, env=shell_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert ".textcraftor" in done.stderr and "cannot be written (" in done.stderr and "run a copy" in done.stderr


def test_so_is_one_that_a_verb_cannot_write(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project")
    (folder / "data/resolved.json").unlink()
    command = [*read_only(folder / "data"), sys.executable, "-m", "textcraftor.cli", "resolve"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("textcraftor: ") and "copy of the project" in done.stderr


def test_without_a_folder_for_temporary_files_it_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    with pytest.raises(ConfigError, match="Set TMPDIR to one that can"):
        require_usable_folder(tmp_path, tmp_path / ".textcraftor")
