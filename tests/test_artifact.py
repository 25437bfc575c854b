"""Tests of atomic writing, digests and proofs."""

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from textcraftor import artifact
from textcraftor.artifact import digest, identity, proof, write_json, written_aside
from textcraftor.config import ChainConfig


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_file_or_folder_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "artifact"
    with written_aside(target) as aside:
        folder_with(aside, a="1")
        assert not target.exists()
    with pytest.raises(RuntimeError), written_aside(target) as aside:
        folder_with(aside, a="2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with written_aside(target) as aside:
        folder_with(aside, b="3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["artifact"]


def test_a_digest_depends_on_bytes_and_names_alone(tmp_path: Path) -> None:
    one = folder_with(tmp_path / "one", a="1", b="2")
    assert digest(one) == digest(folder_with(tmp_path / "same", b="2", a="1"))
    assert digest(one) != digest(folder_with(tmp_path / "bytes", a="1", b="3"))
    assert digest(one) != digest(folder_with(tmp_path / "names", a="1", c="2"))
    with pytest.raises(FileNotFoundError):
        digest(tmp_path / "nothing")


def test_identity_is_the_digest_of_a_folder_or_the_revision_of_a_hub_id(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", a="1")
    assert identity("model", tmp_path) == identity(str(folder), Path()) == digest(folder)
    assert identity("owner/model", tmp_path, "abc") == "owner/model@abc"


def test_equal_inputs_give_equal_proofs(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("prompts")
    made = [proof({"chain": ChainConfig()}, {"prompts": tmp_path / "in"}, 3) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0]["inputs"] == {"prompts": digest(tmp_path / "in")}
    assert made[0]["config"]["chain"]["num_inference_steps"] == 25
    assert {"seed", "code_revision", "versions"} < made[0].keys()
    (tmp_path / "in").write_text("others")
    assert proof({}, {"prompts": tmp_path / "in"}, 3)["inputs"] != made[0]["inputs"]


def test_json_with_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"delta": 1.5})
    with pytest.raises(ValueError):
        write_json(path, {"delta": float("nan")})
    assert json.loads(path.read_text()) == {"delta": 1.5}


def test_other_files_in_the_folder_are_not_touched(tmp_path: Path) -> None:
    """Other processes write to a shared folder: a dangling link stands for a file that was just deleted."""
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with written_aside(tmp_path / "mine") as aside:
        aside.mkdir()
        (aside / "part").write_text("whole")
    assert (tmp_path / "mine/part").read_text() == "whole"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository of somebody's own, with one commit."""
    if not shutil.which("git"):
        pytest.skip("makes a repository, and there is no git on PATH")
    folder = tmp_path / "company"
    folder.mkdir()
    (folder / "README").write_text("ours")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make the library believe that its module is in `folder`."""
    folder.mkdir(parents=True)
    module = Path(shutil.copy(artifact.__file__, folder))
    monkeypatch.setattr(artifact, "__file__", str(module))
    return module


def test_the_code_revision_is_never_that_of_an_enclosing_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library installed in another project's folder is not part of that project's history."""
    installed(monkeypatch, repository / "venv/lib/textcraftor")
    assert artifact.code_revision() == version("textcraftor")


def test_the_code_revision_of_a_checkout_is_its_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = installed(monkeypatch, repository / "textcraftor")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "library")
    commit = git(repository, "rev-parse", "HEAD")
    assert artifact.code_revision() == commit
    module.write_text("# changed")
    assert artifact.code_revision() == f"{commit}+dirty"
