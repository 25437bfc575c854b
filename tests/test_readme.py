"""Every command in the README exists."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from textcraftor.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STYLE = (ROOT / "docs/style.md").read_text(encoding="utf-8")


def commands(program: str, text: str = README) -> list[list[str]]:
    """The arguments of each call of `program`, in blocks and in inline code."""
    lines = [
        line.strip().removeprefix("$ ") for block in re.findall(r"```.*?\n(.*?)```", text, re.S) for line in block.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_textcraftor_verbs_parse() -> None:
    found = [*commands("textcraftor"), *commands("textcraftor", STYLE)]
    assert found
    for verb, *arguments in found:
        command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        command.make_context(verb, [argument.replace("MIX", "balanced") for argument in arguments])


def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path) -> None:
    """On random weights in place of the tiny base and what was trained on it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, "data/tiny/base")
    for mix in ("balanced", "aesthetic"):
        shutil.copytree(base_folder / "text_encoder", f"data/encoders/{mix}/text_encoder")
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, Any] = {}
    exec(snippet, found)  # noqa: S102 (our own README)
    assert found["image"].size == (64, 64)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    found = {argument for arguments in commands("make") for argument in arguments if "=" not in argument}
    assert {"full", "test"} <= found <= targets


def test_ci_runs_what_make_check_runs() -> None:
    (check,) = re.findall(r"^check:(.*)", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"\bmake ([a-z]+)$", (ROOT / ".ci/run").read_text(), re.M) == check.split()


def test_deployments_exist() -> None:
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    known = {f"{entry['entrypoint'].split(':')[0].split('/')[1].removesuffix('.py')}/{entry['name']}" for entry in deployed}
    named = {word for arguments in commands("prefect") for word in arguments if "/" in word and "=" not in word}
    assert named and {name.replace("textcraftor/", "full/") for name in named} <= known


def test_dvc_stages_exist() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for arguments in commands("dvc"):
        for argument in arguments[1:] if arguments[0] in ("repro", "unfreeze") else []:
            assert argument.startswith("-") or argument.split("@")[0] in stages or (ROOT / argument).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
