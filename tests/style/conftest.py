"""A workspace with a random base and two tuned encoders of it."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from textcraftor import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workspace(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, "base")
    params = {
        "profile": "tiny",
        "base": {"path": "base", "resolution": 32},
        "chain": {"num_inference_steps": 5, "guidance_scale": 3.0},
        "train": {"grad_steps": 1},
        "train_unet": {"grad_steps": 1},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for mix, shift in (("balanced", 0.05), ("aesthetic", -0.05)):
        folder = Path("data/encoders") / mix / "text_encoder"
        shutil.copytree(base_folder / "text_encoder", folder)
        weights = load_file(folder / "model.safetensors")
        moved = {name: value + shift * value.flip(0) if value.ndim > 1 else value for name, value in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line here: (status, out, err)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["textcraftor", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run
