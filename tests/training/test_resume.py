"""Which settings may change before a run resumes, and what is reported when others did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import Redness
from tests.training.test_stages import CPU, changed, contents, make_workspace
from textcraftor.cache.prepare import prepare
from textcraftor.config import Config, TrainConfig
from textcraftor.errors import TrainingError
from textcraftor.training.resume import EXECUTION_SETTINGS, OUTPUT_SETTINGS
from textcraftor.training.stages import train_text_encoder

STATE = Path(".textcraftor/training")
SAME_RESULT: dict[str, Any] = {
    "checkpoint_every": 7,
    "checkpoint_minutes": 5.0,
    "grid_every": 2,
    "decode_size": 1,
    "gradient_checkpointing": True,
    "selective_checkpointing": True,
    "batch_size": 1,
    "accumulation": 2,
}


class Killed(Exception):
    """Stands for a crash of the process."""


@pytest.fixture(scope="module")
def killed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """The workspace of a run of three steps that died in the third, to be copied; its checkpoint is of step 2."""
    folder = tmp_path_factory.mktemp("killed")
    run = changed(make_workspace(folder, base_folder), {"train": {"steps": 3, "learning_rate": 1e-4}})
    prepare(run, folder, CPU)
    score, calls = Redness.score, list[int]()

    def dies_in_step_three(self: Redness, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return score(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Redness, "score", dies_in_step_three)
        with pytest.raises(Killed):
            train_text_encoder(run, "redder", folder, CPU)
    return folder, run


@pytest.fixture
def killed_run(killed: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A workspace in which a run of three steps died in the third."""
    folder, run = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return run


def checkpoint() -> Path:
    (found,) = STATE.rglob("checkpoint.safetensors")
    return found


def messages(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_settings_that_do_not_change_the_result_resume(
    killed_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    resumed = load_file(train_text_encoder(changed(killed_run, {"train": SAME_RESULT}), "redder", tmp_path, CPU) / WEIGHTS)
    assert "resumed after step 2" in messages(capsys)
    unbroken = load_file(train_text_encoder(killed_run, "redder", tmp_path, CPU) / WEIGHTS)
    assert "resumed" not in messages(capsys)
    for name, value in unbroken.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding only, which AdamW magnifies
            torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-3)


WEIGHTS = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"train": {"learning_rate": 5e-5}}, "train.learning_rate: 0.0001 -> 5e-05"),
        ({"train": {"batch_size": 4}}, "train.batch_size x accumulation x processes: 2 -> 4"),
        ({"mix": {"redder": {"redness": 2.0}}}, "mix.redness: 1.0 -> 2.0"),
    ],
)
def test_settings_that_change_the_result_are_named_and_the_checkpoint_is_kept(
    killed_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], difference: str
) -> None:
    before, path = checkpoint().read_bytes(), checkpoint()
    capsys.readouterr()
    train_text_encoder(changed(killed_run, settings), "redder", tmp_path, CPU)
    told = messages(capsys)
    assert (
        f"checkpoint of step 2 exists in {tmp_path / path.parent}" in told and difference in told and "starts at step 0" in told
    )
    assert told.count(" -> ") == 1, "nothing else differs"
    assert path.read_bytes() == before
    train_text_encoder(killed_run, "redder", tmp_path, CPU)
    assert "resumed after step 2" in messages(capsys)


@pytest.mark.parametrize("damage", ["truncated", "a folder"])
def test_an_unreadable_checkpoint_stops_the_run_and_is_kept(killed_run: Config, tmp_path: Path, damage: str) -> None:
    path = checkpoint()
    data = path.read_bytes()[:-9]
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data)
    else:
        path.mkdir()
    with pytest.raises(
        TrainingError, match=r"checkpoint\.safetensors exists but cannot be read .*delete it to start at step 0"
    ):
        train_text_encoder(killed_run, "redder", tmp_path, CPU)
    assert path.is_dir() if damage == "a folder" else path.read_bytes() == data


def test_the_proof_records_where_and_how_each_step_was_computed(killed_run: Config, tmp_path: Path) -> None:
    resumed = train_text_encoder(killed_run, "redder", tmp_path, CPU)
    proof = json.loads((resumed / "proof.json").read_text())
    (only,) = proof["execution"]
    assert {"from_step": 0, "world_size": 1, "device": "cpu", "batch_size": 2, "accumulation": 1}.items() <= only.items()
    assert only["cpu_threads"] == torch.get_num_threads()
    before = contents(resumed)
    assert contents(train_text_encoder(killed_run, "redder", tmp_path, CPU)) == before, "killed or not: the same bytes"


def test_a_change_on_resuming_is_recorded_in_the_proof(killed_run: Config, tmp_path: Path) -> None:
    out = train_text_encoder(changed(killed_run, {"train": SAME_RESULT}), "redder", tmp_path, CPU)
    first, second = json.loads((out / "proof.json").read_text())["execution"]
    assert (first["from_step"], first["batch_size"], first["decode_size"]) == (0, 2, killed_run.train.decode_size)
    assert (second["from_step"], second["batch_size"], second["decode_size"]) == (2, 1, 1)


def test_settings_outside_the_facts_exist() -> None:
    """A renamed setting must not become part of the facts unnoticed."""
    assert TrainConfig.model_fields.keys() >= OUTPUT_SETTINGS | EXECUTION_SETTINGS
