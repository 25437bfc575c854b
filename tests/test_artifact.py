"""Artifacts are written whole or not at all, and their digests speak of their bytes."""

import json
from pathlib import Path

import pytest

from textcraftor.artifact import digest, identity, proof, write_json, written_aside
from textcraftor.config import ChainConfig


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_file_and_a_folder_take_their_name_only_when_whole(tmp_path: Path) -> None:
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


def test_a_digest_changes_with_bytes_and_names_and_nothing_else(tmp_path: Path) -> None:
    one = folder_with(tmp_path / "one", a="1", b="2")
    assert digest(one) == digest(folder_with(tmp_path / "same", b="2", a="1"))
    assert digest(one) != digest(folder_with(tmp_path / "bytes", a="1", b="3"))
    assert digest(one) != digest(folder_with(tmp_path / "names", a="1", c="2"))
    with pytest.raises(FileNotFoundError):
        digest(tmp_path / "nothing")


def test_identity_is_bytes_for_a_folder_and_the_revision_for_a_hub_id(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", a="1")
    assert identity(str(folder)) == digest(folder)
    assert identity("owner/model", "abc") == "owner/model@abc"


def test_a_proof_is_the_same_today_and_tomorrow(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("prompts")
    made = [proof({"chain": ChainConfig()}, {"prompts": tmp_path / "in"}, 3) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0]["inputs"] == {"prompts": digest(tmp_path / "in")}
    assert made[0]["config"]["chain"]["num_inference_steps"] == 25
    assert {"seed", "code_revision", "versions"} < made[0].keys()
    (tmp_path / "in").write_text("others")
    assert proof({}, {"prompts": tmp_path / "in"}, 3)["inputs"] != made[0]["inputs"]


def test_json_refuses_what_is_not_a_number_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"delta": 1.5})
    with pytest.raises(ValueError):
        write_json(path, {"delta": float("nan")})
    assert json.loads(path.read_text()) == {"delta": 1.5}


def test_what_lies_beside_is_not_touched(tmp_path: Path) -> None:
    """Others come and go in a shared folder: a link to nothing stands for a file that has just been deleted."""
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with written_aside(tmp_path / "mine") as aside:
        aside.mkdir()
        (aside / "part").write_text("whole")
    assert (tmp_path / "mine/part").read_text() == "whole"
