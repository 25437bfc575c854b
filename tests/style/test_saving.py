"""A saved blend is a candidate like any other."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from tests.style.conftest import Run
from textcraftor import training_proof
from textcraftor.artifact import digest, write_json
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Weights, load
from textcraftor.control import Control
from textcraftor.errors import ConfigError, ModelError, Unproven
from textcraftor.evaluate.provenance import scores_proof, trained_on, weights_record
from textcraftor.models.base import load_base
from textcraftor.models.blended import load_blend, load_model
from textcraftor.signing import Keyring
from textcraftor.trust.statement import files

CPU = torch.device("cpu")


@pytest.fixture
def saved(run: Run) -> Candidate:
    """The blend `soft`, whose parts say what they were trained on."""
    for mix, reward in (("balanced", "clip"), ("aesthetic", "aesthetic")):
        fingerprint = {"digest": reward, "largest": []}
        write_json(Path("data/encoders") / mix / "proof.json", {"trained_weights": {reward: fingerprint}})
    status, out, err = run("blend", "original=0.2", "balanced=0.5", "aesthetic=0.3", "--save", "soft")
    assert status == 0 and out == "data/blends/soft\n" and "blends: [soft]" in err
    return Candidate.find("blend-soft", Path())


def test_it_draws_what_its_weights_say_wherever_it_is(saved: Candidate) -> None:
    config = load("params.yaml")
    base = load_base(config.base, CPU)
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    parts = {mix: Candidate.find(mix, Path()) for mix in ("balanced", "aesthetic")}
    expected = sampler.generate(["a"], [1], load_blend(parts, saved.blend.weights, base))  # type: ignore[union-attr]
    shutil.rmtree("data/encoders")
    shutil.copytree("data/blends/soft", "elsewhere")
    moved = Candidate.at(Path("elsewhere"))
    assert moved.digest == saved.digest
    assert torch.equal(sampler.generate(["a"], [1], load_model(moved, base)), expected)
    words = Control.from_folders({"soft": "elsewhere"})(base.pipe, "a")
    ours = base.conditioning(["a"]).prompt_embeds
    torch.testing.assert_close(words["prompt_embeds"], ours[1:], atol=1e-5, rtol=0)  # before the switch


def test_its_digest_and_proof_cover_weights_and_parts(saved: Candidate) -> None:
    config = load("params.yaml")
    about = {**scores_proof(config, saved, Path()), **weights_record(config, saved, Path())}
    assert set(about["trained_weights"]) == {"clip", "aesthetic"}
    assert {"clip", "aesthetic"} <= {*trained_on(config, saved, about)}
    assert {"blend.json", "aesthetic/text_encoder", "balanced/text_encoder"} <= about["inputs"].keys()
    record = json.loads(Path("data/blends/soft/blend.json").read_text())
    assert record["parts"]["balanced"]["digest"] == Candidate.find("balanced", Path()).digest
    file, before = Path("data/blends/soft/blend.json"), saved.digest
    file.write_text(file.read_text().replace("original=0.2", "original=0.1").replace("aesthetic=0.3", "aesthetic=0.4"))
    assert Candidate.find("blend-soft", Path()).digest != before


def test_a_part_that_says_not_what_it_was_trained_on_leaves_the_blend_unproven(run: Run) -> None:
    assert run("blend", "original=0.5", "balanced=0.5", "--save", "soft")[0] == 0
    assert "trained_weights" not in weights_record(load("params.yaml"), Candidate.find("blend-soft", Path()), Path())


@pytest.mark.parametrize("fault", ["part", "json", "missing"])
def test_a_changed_or_damaged_blend_is_refused(saved: Candidate, run: Run, fault: str) -> None:
    folder = Path("data/blends/soft")
    if fault == "part":
        weights = "text_encoder/model.safetensors"
        shutil.copyfile(f"data/encoders/aesthetic/{weights}", folder / "parts/balanced" / weights)
    elif fault == "json":
        (folder / "blend.json").write_text('{"space": "embeddings", "weights": ["balanced"], "parts": {}}')
    else:
        shutil.rmtree(folder / "parts/balanced")
    status, out, err = run("generate", "a red circle", "--model", "data/blends/soft")
    message = {"part": "its part balanced was changed", "json": "blend.json is damaged", "missing": "holds no model"}[fault]
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_merged_weights_make_a_plain_candidate(run: Run) -> None:
    status, _, _ = run("blend", "original=0.5", "balanced=0.5", "--space", "weights", "--save", "merged")
    merged = Candidate.find("blend-merged", Path())
    assert status == 0 and list(merged.parts) == ["text_encoder"]
    assert run("generate", "a red circle", "--model", "data/blends/merged")[0] == 0
    proof = json.loads(Path("data/blends/merged/proof.json").read_text())
    assert proof["inputs"]["balanced/text_encoder"] == digest(Path("data/encoders/balanced/text_encoder"))


def test_blends_of_the_configuration_are_candidates(run: Run) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    blends = {"blends": ["soft"], "blend": {"soft": {"weights": {"original": 0.5, "balanced": 0.5}}}}
    Path("params.yaml").write_text(yaml.safe_dump({**params, **blends}))
    assert load("params.yaml").candidates == ("balanced", "aesthetic", "blend-soft")
    assert run("blend", "--save", "soft")[0] == 0
    assert run("generate", "a red circle", "--model", "blend-soft")[0] == 0
    status, _, err = run("blend", "original=0.4", "balanced=0.6", "--save", "soft")
    assert status == 2 and "the configuration has another blend.soft" in err
    for wrong, message in (({"balanced": 0.5}, "sum to 0.5"), ({"warm": 1}, "Unknown encoder 'warm'")):
        Path("params.yaml").write_text(yaml.safe_dump({**params, "blends": ["soft"], "blend": {"soft": {"weights": wrong}}}))
        with pytest.raises(ConfigError, match=message):
            load("params.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["original=1", "--save", "soft"], "is the base itself"),
        (["balanced=1", "--save", "../soft"], "small letters"),
        (["--save", "soft"], "A blend needs weights"),
        (["balanced=1@0..0.9", "original=1@0.9..1", "--space", "weights", "--save", "soft"], "the same in every step"),
    ],
)
def test_what_cannot_be_saved_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run("blend", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert not Path("data/blends").exists()


def test_a_blend_is_no_part_of_a_blend(saved: Candidate) -> None:
    config = load("params.yaml")
    base = load_base(config.base, CPU)
    with pytest.raises(ModelError, match="soft is a blend itself"):
        load_blend({"soft": saved}, Weights.parse(["soft=1"]), base)


@pytest.mark.parametrize("space", ["embeddings", "weights"])
def test_a_blend_was_trained_on_what_its_parts_were(run: Run, space: str) -> None:
    ring = Keyring(Path())
    for mix in ("balanced", "aesthetic"):
        write_json(Path("data/encoders") / mix / "proof.json", {"trained_weights": {mix: {}}})
        training_proof.write(Path("data/encoders") / mix, ["text_encoder"], [f"on {mix}"], {mix: {}}, ring)
    assert run("blend", "balanced=0.5", "aesthetic=0.5", "--space", space, "--save", "soft")[0] == 0
    folder = Path("data/blends/soft")
    trained = training_proof.read(folder, files(folder), ring.believed())
    prompts = pl.concat([each.prompts for each in trained]).sort()
    assert prompts.equals(training_proof.prompt_numbers(["on balanced", "on aesthetic"]))
    assert {name for each in trained for name in each.weights} == {"balanced", "aesthetic"}
    Path("data/encoders/balanced/training.dsse.json").unlink()
    assert run("blend", "balanced=0.5", "aesthetic=0.5", "--space", space, "--save", "soft")[0] == 0
    with pytest.raises(Unproven, match="is not signed, so nobody knows on which prompts"):
        training_proof.read(folder, files(folder), ring.believed())
