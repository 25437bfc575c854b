"""Tests of the command line: a user's mistake is one line, exit status 2, and no partial output."""

import subprocess
import sys
from pathlib import Path

import pytest

from textcraftor import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: tiny\n")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["textcraftor", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_config_prints_every_setting(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(monkeypatch, capsys, "config")
    assert status == 0 and "num_inference_steps: 10" in out and "weight_decay: 0.01" in out


def test_a_verb_of_the_pipeline_waits_for_no_model_library() -> None:
    """`validate` and `rollback` draw nothing, and to import what draws takes ten times as long as what they do."""
    probe = "import sys, textcraftor.cli, textcraftor.plugins; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_config_lists_the_profiles(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "profiles").mkdir()
    (workspace / "profiles/mine.yaml").write_text("{}")
    status, out, _ = run(monkeypatch, capsys, "config", "--list")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == ["mine", "sd15", "sd21", "sdxl", "tiny"]


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ("profile: tiny\nsampler: {switch_at: 1.4}", ["config"], "fraction of the chain"),
        ("profile: tiny\nfoo: 1", ["curate"], "Unknown key 'foo'"),
        ("profile: tiny\nmix: {balanced: {hps: 1}}", ["prepare"], "Unknown reward 'hps'"),
        ("profile: tiny", ["train", "--mix", "nope"], "Unknown mix 'nope'. Known: aesthetic, balanced, paper."),
        ("profile: tiny", ["train", "--mix", "balanced"], "data/tiny/base"),
        ("profile: tiny", ["prepare"], "data/tiny/base"),
        ("profile: tiny", ["prepare", "--device", "cuda:99"], "Device 'cuda:99' cannot be used"),
        ("profile: tiny", ["evaluate", "--candidate", "nope"], "nope"),
        ("profile: tiny", ["ablate", "table1"], "Run `textcraftor curate` first"),
        ("profile: tiny", ["generate", " "], "The prompt is empty"),
        ("profile: tiny", ["config", "--params", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    params: str,
    arguments: list[str],
    message: str,
) -> None:
    (workspace / "params.yaml").write_text(params)
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err, err
    assert err.startswith("textcraftor: ") and err.count("\n") == 1 and not out
    assert [path.name for path in workspace.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a red circle\n\xff\xfe circle\n", "UTF-8")],
    ids=["empty", "not UTF-8"],
)
def test_a_bad_prompt_file_is_one_line(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    (workspace / "mine.txt").write_bytes(content)
    (workspace / "params.yaml").write_text("profile: tiny\nprompts: {sources: [{kind: file, path: mine.txt}]}\n")
    status, _, err = run(monkeypatch, capsys, "curate")
    assert status == 2 and "mine.txt" in err and message in err and err.count("\n") == 1
    assert not (workspace / "data").exists()


def test_tiny_build_does_nothing_when_the_weights_exist(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(monkeypatch, capsys, "tiny-build", "--out", str(ROOT / "data/tiny"), "--work", "scratch")
    assert status == 0 and "nothing" in out
