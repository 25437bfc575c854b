"""prepare and train as stages: what they write, what they reuse, what they refuse. On a random model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from textcraftor import config
from textcraftor.candidate import Candidate
from textcraftor.config import Config
from textcraftor.errors import ModelError, TrainingError
from textcraftor.generate import draw
from textcraftor.models import load_base
from textcraftor.prepare import prepare, read_train_latents
from textcraftor.prompts import curate
from textcraftor.sampler import Sampler
from textcraftor.tuning import train_text_encoder, train_unet

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A workspace with curated prompts and a reward that needs no weights."""
    monkeypatch.chdir(tmp_path)
    redness = {"kind": "tests.conftest:Redness"}
    tune = {"grad_steps": 1, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1}
    params = {
        "profile": "tiny",
        "mixes": ["redder"],
        "unet_mixes": ["redder"],
        "prompts": {"sources": [{"kind": "scenes", "count": 12}], "heldout": 4},
        "base": {"path": str(base_folder), "resolution": 32},
        "chain": {"num_inference_steps": 5},
        "rewards": {"redness": redness},
        "mix": {"redder": {"redness": 1.0}},
        "train": {**tune, "switch_at": 0.6, "allow_without_clip": True},
        "train_unet": tune,
        "evaluate": {"prompts": 4, "images_per_prompt": 2},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    resolved = config.load("params.yaml", {"mix": {"balanced": {"redness": 1.0}, "aesthetic": {"redness": 1.0}}})
    curate(resolved.prompts, tmp_path, tmp_path / "data/prompts/curated")
    return resolved


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare_reuses_what_fits_and_recomputes_what_is_stale(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(settings: Config) -> list[str]:
        prepare(settings, tmp_path, CPU)
        return [line for line in capsys.readouterr().err.splitlines() if "prefixes" in line]

    assert said(run) == ["train: 8 prefixes of 3 steps computed", "heldout: 8 prefixes of 2 steps computed"]
    before = contents(tmp_path / "data/latents")
    assert {"train.safetensors", "heldout.safetensors", "features/redness.safetensors"} == before.keys()
    assert said(run) == ["train: 8 prefixes of 3 steps reused", "heldout: 8 prefixes of 2 steps reused"]
    assert contents(tmp_path / "data/latents") == before
    other_switch = run.model_copy(update={"sampler": config.SamplerConfig(switch_at=0.2)})
    assert said(other_switch) == ["train: 8 prefixes of 3 steps reused", "heldout: 8 prefixes of 1 steps computed"]
    other_chain = run.model_copy(update={"chain": run.chain.model_copy(update={"guidance_scale": 2.0})})
    with pytest.raises(ModelError, match="belongs to other prompts, base or settings"):
        read_train_latents(other_chain, tmp_path)


def test_cached_latents_are_what_the_sampler_would_compute(run: Config, tmp_path: Path) -> None:
    from textcraftor.prepare import train_rows

    prepare(run, tmp_path, CPU)
    prompts, _, seeds = train_rows(tmp_path)
    sampler = Sampler(load_base(run.base, CPU), run.chain, run.train.switch_at)
    torch.testing.assert_close(read_train_latents(run, tmp_path), sampler.prefix(prompts, seeds), atol=1e-4, rtol=0)


def test_a_damaged_cache_is_recomputed(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    cache = tmp_path / "data/latents/train.safetensors"
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError):
        read_train_latents(run, tmp_path)
    prepare(run, tmp_path, CPU)
    assert cache.read_bytes() == whole


def test_training_leaves_an_artifact_with_its_proof_and_the_same_bytes_again(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    out = train_text_encoder(run, "redder", tmp_path, CPU)
    made = contents(out)
    assert {"text_encoder/model.safetensors", "history.csv", "proof.json", "grids/step_000002.png"} <= made.keys()
    proof = json.loads(made["proof.json"])
    assert proof["config"]["mix"] == {"redness": 1.0} and {"prompts", "latents"} <= proof["inputs"].keys()
    assert not any((tmp_path / ".textcraftor/training").iterdir()), "the state to resume from is gone once it is done"
    assert contents(train_text_encoder(run, "redder", tmp_path, CPU)) == made


def test_the_encoder_differs_from_the_base_in_every_part_that_learns(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    tuned = load_file(train_text_encoder(run, "redder", tmp_path, CPU) / "text_encoder/model.safetensors")
    frozen = load_base(run.base, CPU).text_encoder.state_dict()
    changed = {name for name, value in tuned.items() if not torch.equal(value, frozen[name])}
    assert any("layers.0" in name for name in changed) and any("layers.1" in name for name in changed)


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


def test_prefixes_of_another_precision_or_size_are_stale(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    assert read_train_latents(run, tmp_path).shape == (8, 4, 4, 4)
    lower = run.model_copy(update={"base": run.base.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(ModelError, match="belongs to other prompts, base or settings"):
        read_train_latents(lower, tmp_path)
    larger = run.model_copy(update={"base": run.base.model_copy(update={"resolution": 64})})
    prepare(larger, tmp_path, CPU)
    assert read_train_latents(larger, tmp_path).shape == (8, 4, 8, 8)


def test_sdxl_in_bfloat16_with_both_encoders_and_a_multistep_solver(
    run: Config, family_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The whole way: prefixes with the solver's history, two encoders in one run, the UNet after them, an image."""
    settings = {
        "base": {"path": str(family_folders["sdxl"]), "resolution": 32, "dtype": "bfloat16"},
        "chain": {"scheduler": "dpmsolver"},
        "train": {"encoders": ["text_encoder_2", "text_encoder"]},
    }
    xl = config.load("params.yaml", {**settings, "mix": {"balanced": {"redness": 1.0}, "aesthetic": {"redness": 1.0}}})
    prepare(xl, tmp_path, CPU)
    assert read_train_latents(xl, tmp_path).shape == (8, 8, 4, 4)
    out = train_text_encoder(xl, "redder", tmp_path, CPU)
    assert contents(train_text_encoder(xl, "redder", tmp_path, CPU)) == contents(out)
    assert json.loads((out / "proof.json").read_text())["weights"].keys() == {"text_encoder", "text_encoder_2"}
    base = load_base(xl.base, CPU)
    for name in ("text_encoder", "text_encoder_2"):
        tuned, frozen = load_file(out / name / "model.safetensors"), base.encoders[name].state_dict()
        assert any(not torch.equal(value, frozen[key]) for key, value in tuned.items()), name
    train_unet(xl, "redder", tmp_path, CPU)
    candidate = Candidate.find("redder-unet", tmp_path)
    assert set(candidate.parts) == {"text_encoder", "text_encoder_2", "unet"}
    draw(xl, candidate, "a red circle", 0, tmp_path / "drawn.png", CPU)
    assert (tmp_path / "drawn.png").is_file()


def test_training_without_prepare_says_what_to_do(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"features.redness\.safetensors does not exist\. Run `textcraftor prepare`"):
        train_text_encoder(run, "redder", tmp_path, CPU)


def test_a_failed_training_keeps_the_last_artifact_and_its_checkpoint(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(run, tmp_path, CPU)
    before = contents(train_text_encoder(run, "redder", tmp_path, CPU))
    steps = iter([1.0, float("nan")])
    from tests.conftest import Redness

    score = Redness.score
    monkeypatch.setattr(Redness, "score", lambda self, *inputs: score(self, *inputs) * next(steps))
    with pytest.raises(TrainingError, match="redness is not finite"):
        train_text_encoder(run, "redder", tmp_path, CPU)
    assert contents(tmp_path / "data/encoders/redder") == before
    assert list((tmp_path / ".textcraftor/training").rglob("checkpoint.safetensors"))
