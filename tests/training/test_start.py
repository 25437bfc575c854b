"""Transfer: trainings that start from a tuned encoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_stages import CPU, changed, contents, make_workspace, run
from textcraftor import training_proof
from textcraftor.artifact import digest
from textcraftor.cache.prepare import prepare
from textcraftor.candidate import Candidate
from textcraftor.config import Config
from textcraftor.errors import ConfigError, ModelError
from textcraftor.prompts.table import read_prompts
from textcraftor.signing import Keyring
from textcraftor.training.stages import train_text_encoder
from textcraftor.training.start import find_start

__all__ = ["run"]  # the fixture

FIRST, SECOND = Path("data/encoders/redder"), Path("data/encoders/bluer")
WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def trained(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A workspace in which `redder` is trained and `bluer` starts from it, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    values = {"curriculum": {"bluer": "redder"}, "mix": {"bluer": {"redness": 2.0}}}
    run = changed(make_workspace(folder, base_folder), values)
    prepare(run, folder, CPU)
    train_text_encoder(run, "redder", folder, CPU)
    return folder, run


@pytest.fixture
def transfer(trained: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """`redder` is trained; `bluer` starts from it."""
    folder, run = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return run


def test_a_mix_starts_from_the_tuned_encoder_and_the_prefix_from_the_original(transfer: Config, tmp_path: Path) -> None:
    latents = contents(Path("data/latents"))
    still = changed(transfer, {"train": {"learning_rate": 1e-30}})  # too little to change a weight
    train_text_encoder(still, "bluer", tmp_path, CPU)
    first, second = load_file(FIRST / WEIGHTS), load_file(SECOND / WEIGHTS)
    original = load_file(Path(transfer.base.path) / WEIGHTS)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-6, atol=1e-7)
    assert any(
        not torch.equal(value, original.get(key, original.get(key.removeprefix("text_model.")))) for key, value in first.items()
    )
    assert contents(Path("data/latents")) == latents
    proof = json.loads((SECOND / "proof.json").read_text())
    assert proof["inputs"]["start/text_encoder"] == digest(FIRST / "text_encoder")


class Stopped(Exception):
    """Raised before the first step."""


def test_another_start_is_another_run(transfer: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes, wherever the folder lies: a checkpoint is resumed by a run with the same start."""
    shutil.copytree(FIRST, "elsewhere")
    found: list[dict[str, Any]] = []

    def stop(facts: dict[str, Any]) -> str:
        found.append(facts)
        raise Stopped

    monkeypatch.setattr("textcraftor.training.stages.facts_key", stop)
    no_curriculum = transfer.model_copy(update={"curriculum": {}})
    for settings in (transfer, changed(no_curriculum, {"train": {"start_from": "elsewhere"}}), no_curriculum):
        with pytest.raises(Stopped):
            train_text_encoder(settings, "bluer", tmp_path, CPU)
    assert found[0] == found[1] != found[2]


def test_what_it_was_trained_on_before_counts(transfer: Config, tmp_path: Path) -> None:
    ring, prompts = Keyring(tmp_path), read_prompts(Path("data/prompts/curated/train.parquet"))["prompt"].to_list()
    (first,) = training_proof.of_candidate(Candidate.find("redder", tmp_path), ring.believed())
    assert first.prompts.equals(training_proof.prompt_numbers(prompts)) and list(first.weights) == ["redness"]
    training_proof.write(FIRST, ["text_encoder"], ["seen before"], {}, ring)
    train_text_encoder(transfer, "bluer", tmp_path, CPU)
    assert "redness" in json.loads((SECOND / "proof.json").read_text())["trained_weights"]
    (second,) = training_proof.of_candidate(Candidate.find("bluer", tmp_path), ring.believed())
    assert second.prompts.equals(training_proof.prompt_numbers([*prompts, "seen before"]))
    proof = json.loads((FIRST / "proof.json").read_text())
    heldout = {"digest": "kind clip", "largest": []}
    (FIRST / "proof.json").write_text(json.dumps({**proof, "trained_weights": {"seen": heldout}}))
    rewards = {"rewards": {"judge": {"kind": "clip"}}}
    judged = transfer.model_copy(update={"rewards": changed(transfer, rewards).rewards})
    judged = judged.model_copy(update={"evaluate": judged.evaluate.model_copy(update={"heldout_judges": ("judge",)})})
    with pytest.raises(
        ConfigError, match="to start from was trained on 'seen', which has the weights of the held-out judge 'judge'"
    ):
        train_text_encoder(judged, "bluer", tmp_path, CPU)
    (FIRST / "proof.json").unlink()
    train_text_encoder(transfer, "bluer", tmp_path, CPU)
    assert "trained_weights" not in json.loads((SECOND / "proof.json").read_text())
    assert not (SECOND / training_proof.STATEMENT).exists(), "nobody knows what the start was trained on"


def test_nothing_of_the_start_is_dropped(transfer: Config, tmp_path: Path) -> None:
    shutil.copytree(FIRST, "elsewhere")
    shutil.copytree(Path(transfer.base.path) / "unet", "elsewhere/unet")
    from_folder = changed(transfer.model_copy(update={"curriculum": {}}), {"train": {"start_from": "elsewhere"}})
    with pytest.raises(ModelError, match="starts from elsewhere, whose unet it would drop: it tunes text_encoder"):
        train_text_encoder(from_folder, "bluer", tmp_path, CPU)
    blend = {"space": "embeddings", "weights": ["original=1"], "parts": {}}
    Path("elsewhere/blend.json").write_text(json.dumps(blend))
    with pytest.raises(ModelError, match="elsewhere is a blend of embeddings"):
        find_start(from_folder, "bluer", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"curriculum": {"redder": "bluer"}}, "redder starts from bluer, so take it out of `mixes`"),
        ({"curriculum": {"bluer": "reddish"}}, "Unknown mix 'reddish'"),
        ({"curriculum": {"bluer": "redder2", "redder2": "bluer"}}, "start from each other"),
        ({"train": {"start_from": "data/encoders/redder"}}, "an output of this run. Name the mixes in `curriculum`"),
    ],
)
def test_an_impossible_curriculum_is_refused(run: Config, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(run, values)
    mixes = {"mix": {"bluer": {"redness": 2.0}, "third": {"redness": 3.0}}}
    chained = changed(run, {"curriculum": {"third": "bluer", "bluer": "redder"}, **mixes})
    assert chained.all_mixes == chained.candidates[:3] == ("redder", "bluer", "third")
