"""Law 2: `dvc repro`, the flow's task and the command line make the same bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prefect.logging import disable_run_logger
from typer.testing import CliRunner

from tasks.environment import stage_environment
from tasks.stages import DVC, repro
from textcraftor.artifact import digest
from textcraftor.cli import app
from textcraftor.layout import CURATED, LATENTS, RESOLVED, TINY, VALIDATION

ROOT = Path(__file__).parents[2]
SMALL = {
    "chain": {"num_inference_steps": 5},
    "train": {"grad_steps": 1},
    "train_unet": {"grad_steps": 1},
    "prompts": {"sources": [{"kind": "scenes", "count": 300, "rich_fraction": 0.5}], "heldout": 4, "max_train": 8},
    "evaluate": {"prompts": 4, "images_per_prompt": 2},
    "gate": {"min_prompts": 2},
    "prepare": {"batch_size": 8, "shard_rows": 64, "cpu_threads": 1},
}
STAGES = ("resolve", "curate", "prepare")


def make_workspace(folder: Path) -> Path:
    """The project's own dvc.yaml, base model and rewards, with a few prompts; its validation is taken for granted."""
    shutil.copytree(ROOT / TINY, folder / TINY)
    (folder / "data/sources").mkdir()
    (folder / VALIDATION).parent.mkdir()
    (folder / VALIDATION).write_text("{}")
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | SMALL
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
    return folder


def by_dvc(folder: Path) -> None:
    environment = stage_environment({"HOME": str(folder)}, 1)
    done = subprocess.run([*DVC, "repro", "-s", *STAGES], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def by_task(folder: Path) -> None:
    with disable_run_logger():
        for stage in STAGES:
            assert repro.fn(stage, folder, concurrency=2) == "ran"


def by_hand(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb in STAGES:
            result = CliRunner().invoke(app, [verb, "--device", "cpu"] if verb == "prepare" else [verb])
            assert result.exit_code == 0, result.output


def test_dvc_the_flow_and_the_command_line_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = {}
    for run in (by_dvc, by_task, by_hand):
        folder = make_workspace(tmp_path / run.__name__)
        run(folder)
        assert len(list((folder / LATENTS).rglob("*.safetensors"))) > 2
        made[run.__name__] = {str(path): digest(folder / path) for path in (RESOLVED, CURATED, LATENTS)}
    assert made["by_dvc"] == made["by_task"] == made["by_hand"]
