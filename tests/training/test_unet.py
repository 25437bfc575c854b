"""The stage train-unet on a random model: which encoder it tunes on, and what it writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_stages import CPU, changed, run
from textcraftor.cache.prepare import prepare
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.errors import ModelError
from textcraftor.export import export
from textcraftor.generate import draw
from textcraftor.models.base import load_base, load_candidate
from textcraftor.training.stages import train_text_encoder, train_unet

__all__ = ["run"]  # the fixture


def test_the_unet_is_tuned_on_the_mixs_encoder(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    with pytest.raises(ModelError, match="Unknown candidate 'redder'"):
        train_unet(run, "redder", tmp_path, CPU)
    train_text_encoder(run, "redder", tmp_path, CPU)
    out = train_unet(run, "redder", tmp_path, CPU)
    assert (out / "unet/diffusion_pytorch_model.safetensors").is_file()
    candidate = Candidate.find("redder-unet", tmp_path)
    assert candidate.digest != Candidate.find("redder", tmp_path).digest
    draw(run, candidate, "a red circle", 0, tmp_path / "drawn.png", CPU)
    assert (tmp_path / "drawn.png").is_file()


def test_a_unet_tuned_on_the_original_encoder_is_a_candidate_without_one(run: Config, tmp_path: Path) -> None:
    run = changed(run, {"train_unet": {"encoder": "original"}})
    prepare(run, tmp_path, CPU)
    out = train_unet(run, "redder", tmp_path, CPU)  # no encoder of the mix is there
    candidate = Candidate.find("redder-unet", tmp_path)
    assert candidate.parts == {"unet": out / "unet"} == Candidate.at(out).parts
    assert not json.loads((out / "proof.json").read_text())["inputs"].keys() & {"text_encoder"}
    train_text_encoder(run, "redder", tmp_path, CPU)
    assert Candidate.find("redder-unet", tmp_path) == candidate, "nor is the encoder used once it is"
    base = load_base(run.base, CPU)
    model, sampler = load_candidate(candidate, base), Sampler(base, run.chain, run.sampler.switch_at)
    assert model is not None and not model.encoders
    drawn, original = (sampler.generate(["a red circle"], [0], each) for each in (model, None))
    assert not torch.equal(drawn, original)
    with pytest.raises(ModelError, match="UNet of its own, which diffusers cannot hold"):
        export(model, base, "diffusers", tmp_path / "exported")
    whole = export(model, base, "pipeline", tmp_path / "whole").path
    assert torch.equal(load_file(whole / "unet/diffusion_pytorch_model.safetensors")["conv_in.bias"], model.unet.conv_in.bias)
    (out / "proof.json").write_text("{}")
    assert Candidate.find("redder-unet", tmp_path).parts.keys() == {"text_encoder", "unet"}
