"""Bases and candidates: loaded whole or refused by name."""

import shutil
from pathlib import Path

import pytest
import torch

from textcraftor.candidate import Candidate
from textcraftor.config import BaseConfig
from textcraftor.device import choose_device
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, load_base, load_candidate

CPU = torch.device("cpu")


@pytest.fixture
def encoder_folder(base: Base, tmp_path: Path) -> Path:
    """A workspace with a trained mix: the base's own encoder under another name."""
    folder = tmp_path / "data/encoders/balanced/text_encoder"
    base.pipe.text_encoder.save_pretrained(folder)
    return folder


def test_a_base_is_frozen(base: Base) -> None:
    modules = (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)
    assert base.latent_shape == (4, 4, 4)


def test_the_resolution_sets_the_latents(base_folder: Path) -> None:
    assert load_base(BaseConfig(path=str(base_folder), resolution=64), CPU).latent_shape == (4, 8, 8)


def test_a_missing_base_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base\.path = .*nowhere") as error:
        load_base(BaseConfig(path=str(tmp_path / "nowhere")), CPU)
    assert "\n" not in str(error.value)


def test_a_truncated_weight_file_is_refused(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ModelError, match=r"base/unet/.* is truncated: .* Download it again\. Nothing was loaded as UNet2DConditionModel"
    ):
        load_base(BaseConfig(path=str(tmp_path / "base"), resolution=32), CPU)


def test_candidates_are_found_by_name_and_by_folder(encoder_folder: Path, tmp_path: Path) -> None:
    assert Candidate.find("base", tmp_path).text_encoder is None
    by_name = Candidate.find("balanced", tmp_path)
    by_folder = Candidate.find(str(encoder_folder.parent), Path())
    assert by_name.text_encoder == encoder_folder and by_name.digest == by_folder.digest != ""


def test_an_unknown_candidate_names_the_known_ones(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Unknown candidate 'balance'\. Known: balanced, base\. Did you mean"):
        Candidate.find("balance", tmp_path)
    with pytest.raises(ModelError, match=r"unets.*holds no model"):
        Candidate.find("balanced-unet", tmp_path)


def test_a_digest_is_of_the_weights(encoder_folder: Path, tmp_path: Path) -> None:
    before = Candidate.find("balanced", tmp_path).digest
    (encoder_folder.parent / "history.csv").write_text("step\n")
    assert Candidate.find("balanced", tmp_path).digest == before
    weights = encoder_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert Candidate.find("balanced", tmp_path).digest != before


def test_a_candidate_loads_as_it_was_saved(base: Base, encoder_folder: Path, tmp_path: Path) -> None:
    tuned = load_candidate(Candidate.find("balanced", tmp_path), base)
    assert tuned is not None and tuned.unet is None
    prompts = ["a red circle"]
    ours, theirs = (base.conditioning(prompts, model).prompt_embeds for model in (tuned, None))
    assert torch.equal(ours, theirs)
    assert load_candidate(Candidate("base"), base) is None


def test_weights_that_do_not_fit_are_refused_by_key(base: Base, encoder_folder: Path, tmp_path: Path) -> None:
    config = encoder_folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match=r"does not fit CLIPTextModel \(missing keys: .*layers\.2"):
        load_candidate(Candidate.find("balanced", tmp_path), base)


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ModelError, match="'abacus' cannot be used"):
        choose_device("abacus")
    assert choose_device("cpu") == CPU
