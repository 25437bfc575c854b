"""`generate` draws a judged model with the base, chain and switch it was judged with."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from textcraftor import cli
from textcraftor.artifact import proof
from textcraftor.candidate import Candidate
from textcraftor.config import Config, load
from textcraftor.errors import ModelError
from textcraftor.evaluate.scores import Scores
from textcraftor.generate import draw, with_judged_settings
from textcraftor.snapshot import private_copy

JUDGED = {"chain": {"num_inference_steps": 4, "guidance_scale": 2.0}, "sampler": {"switch_at": 0.75}}
TODAY = {"chain": {"num_inference_steps": 5, "guidance_scale": 6.0}, "sampler": {"switch_at": 0.2}}


def settings(path: str, **sections: Any) -> Config:
    """Write params.yaml with the base at `path`, and resolve it."""
    params = {
        "profile": "tiny",
        "base": {"path": path, "resolution": 32},
        "train": {"grad_steps": 1},
        "train_unet": {"grad_steps": 1},
        **sections,
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return load("params.yaml")


@pytest.fixture
def judged(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A workspace with a base and a version `judged` of it; the settings it was judged with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, "base")
    shutil.copytree(base_folder / "text_encoder", "judged/text_encoder")
    weights = Path("judged/text_encoder/model.safetensors")
    save_file({name: value.flip(0).contiguous() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    config = settings("base", **JUDGED)
    about = proof({name: getattr(config, name) for name in ("base", "chain", "sampler")}, {"base": Path("base")}, 0)
    table = pl.DataFrame({"prompt_id": ["a"], "oracle": [1.0]})
    digest = Candidate.find("./judged", Path()).digest
    Scores("balanced", digest, ("oracle",), (), about, table).write(Path("judged/evidence/scores.parquet"))
    return config


def generate(monkeypatch: pytest.MonkeyPatch, model: str) -> Image.Image:
    """The picture that the command line draws."""
    monkeypatch.setattr(sys, "argv", ["textcraftor", "generate", "a red circle", "--model", model, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    return Image.open("generated.png").convert("RGB")


def expected(config: Config, model: str) -> Image.Image:
    draw(config, Candidate.find(model, Path()), "a red circle", 0, Path("expected.png"), torch.device("cpu"))
    return Image.open("expected.png").convert("RGB")


def same(ours: Image.Image, other: Image.Image) -> bool:
    return ours.size == other.size and ImageChops.difference(ours, other).getbbox() is None


def test_a_judged_model_is_drawn_as_it_was_judged(judged: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    today = settings("base", **TODAY)
    drawn = generate(monkeypatch, "./judged")
    assert same(drawn, expected(judged, "./judged"))
    assert not same(drawn, expected(today, "./judged"))


def test_the_base_and_weights_changed_since_are_drawn_as_params_say(judged: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    today = settings("base", **TODAY)
    assert same(generate(monkeypatch, "base"), expected(today, "base"))
    config = Path("judged/text_encoder/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "trained": "again"}))
    assert same(generate(monkeypatch, "./judged"), expected(today, "./judged"))


def test_another_base_here_is_refused_in_one_line(
    judged: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Path("base/model_index.json")
    index.write_text(index.read_text() + "\n")
    monkeypatch.setattr(sys, "argv", ["textcraftor", "generate", "a red circle", "--model", "./judged"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "was judged on another base" in message and "base had digest" in message
    assert not Path("generated.png").exists()


def test_the_judged_base_is_found_where_it_was_or_where_it_is_configured(judged: Config) -> None:
    about = Scores.read(Path("judged/evidence/scores.parquet")).proof
    shutil.copytree("base", "other")
    Path("other/model_index.json").write_text("{}")
    assert with_judged_settings(settings("other"), about, Path()).base == judged.base
    shutil.move("base", "moved")
    assert with_judged_settings(settings("moved"), about, Path()).base.path == "moved"
    with pytest.raises(ModelError, match="base does not exist, other has"):
        with_judged_settings(settings("other"), about, Path())


def test_a_base_from_the_hub_is_the_judged_id_and_revision(judged: Config) -> None:
    base = judged.base.model_copy(update={"path": "somebody/model", "revision": "abc"})
    about = proof({"base": base, "chain": judged.chain, "sampler": judged.sampler}, {}, 0)
    assert with_judged_settings(settings("base", **TODAY), about, Path()).base == base


@pytest.mark.parametrize("config", [None, {}, {"base": {"path": "base"}}, {"base": {"path": "base", "unheard_of": 1}}])
def test_scores_that_do_not_say_how_they_were_made_are_refused(judged: Config, config: Any) -> None:
    with pytest.raises(ModelError, match="do not say with which base, chain and sampler"):
        with_judged_settings(judged, {"config": config, "inputs": {}}, Path())


@pytest.mark.parametrize(("model", "label"), [("champion", "champion (3)"), ("3", "version 3")])
def test_a_registered_model_is_labelled_by_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, label: str
) -> None:
    """Not by the name of the folder that it was downloaded to."""
    folder = tmp_path / "3-421cb5dd"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "text_encoder/config.json").write_text("{}")
    drawn: list[object] = []
    monkeypatch.setattr("textcraftor.plugins.plugin", lambda *_: lambda *_: folder)
    monkeypatch.setattr("textcraftor.generate.draw", lambda *arguments: drawn.extend(arguments))
    cli.generate(
        "a red circle",
        model=model,
        params=Path(cli.__file__).parents[1] / "params.yaml",
        out=tmp_path / "out.png",
        device="cpu",
    )
    assert drawn[-1] == label


def test_a_vae_that_overflows_draws_no_black_picture(
    judged: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = Path("base/vae/diffusion_pytorch_model.safetensors")
    weights = load_file(vae)
    save_file({**weights, "decoder.conv_in.weight": weights["decoder.conv_in.weight"] * 3e38}, vae, {"format": "pt"})
    settings("base")
    monkeypatch.setattr(sys, "argv", ["textcraftor", "generate", "a red circle", "--model", "base", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "values that are not finite" in said and "set base.dtype: float32 or bfloat16" in said
    assert not Path("generated.png").exists()


def test_what_is_served_was_copied_before_it_was_verified(
    judged: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Registered weights and base that are exchanged after the verification are not drawn from."""
    asked: list[Path] = []

    def registry(model: str, run: Config, private: Path) -> Path:
        asked.append(private)
        return private_copy(Path("judged"), private)

    device = torch.device("cpu")
    draw(judged, Candidate.find("./judged", Path()), "a red circle", 0, Path("before.png"), device, "champion (judged)")
    before = Image.open("before.png").convert("RGB")
    monkeypatch.setattr("textcraftor.plugins.plugin", lambda *_: registry)
    original = with_judged_settings

    def exchange(*arguments: Any) -> Config:
        found = original(*arguments)
        for exchanged in (*Path("judged").rglob("*.safetensors"), *Path("base").rglob("*.safetensors")):
            exchanged.write_bytes(b"others")
        return found

    monkeypatch.setattr("textcraftor.lookup.with_judged_settings", exchange)
    assert same(generate(monkeypatch, "champion"), before)
    assert asked[0].stat().st_mode & 0o77 == 0 and asked[0].is_relative_to(Path(".textcraftor/verified"))
