"""The stages prepare and train on a random model: what they write, reuse and refuse."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.processes import in_processes
from textcraftor import config
from textcraftor.cache import prepare as prepare_module
from textcraftor.cache.prepare import prepare, read_heldout_latents, read_train_latents, train_table
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.errors import StoreError, TrainingError
from textcraftor.generate import draw
from textcraftor.models.base import load_base
from textcraftor.prompts import curate
from textcraftor.training.inline import InlinePrefixes
from textcraftor.training.stages import _load_data, train_text_encoder, train_unet

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A workspace with curated prompts and a reward that needs no weights."""
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path, base_folder)


def make_workspace(folder: Path, base_folder: Path) -> Config:
    """Write params.yaml and curated prompts; returns the configuration, with a reward that needs no weights."""
    redness = {"kind": "tests.fixtures:Redness"}
    tune = {"grad_steps": 1, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "interpolation": 1.0}
    params = {
        "profile": "tiny",
        "mixes": ["redder"],
        "unet_mixes": ["redder"],
        "prompts": {
            "sources": [{"kind": "scenes", "count": 24}],
            "heldout": 4,
            "heldout_share": 0.5,
            "max_train": 8,
        },
        "base": {"path": str(base_folder), "resolution": 32},
        "chain": {"num_inference_steps": 5},
        "rewards": {"redness": redness},
        "mix": {"redder": {"redness": 1.0}},
        "sampler": {"switch_at": 0.4},
        "train": {**tune, "switch_at": 0.6, "num_inference_steps": None, "gradient": "truncated", "allow_without_clip": True},
        "train_unet": tune,
        "prepare": {"batch_size": 2, "shard_rows": 4, "cpu_threads": 1},
        "evaluate": {"prompts": 4, "images_per_prompt": 2},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    resolved = config.load(folder / "params.yaml", {"mix": {"balanced": {"redness": 1.0}, "aesthetic": {"redness": 1.0}}})
    curate(resolved.prompts, folder, folder / "data/prompts/curated")
    return resolved


def changed(run: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values, validated."""
    return Config.model_validate(config.merge(run.model_dump(mode="json"), values))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare_reuses_what_fits_and_recomputes_what_is_stale(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reports(settings: Config) -> list[str]:
        prepare(settings, tmp_path, CPU)
        return [line for line in capsys.readouterr().err.splitlines() if "prefixes" in line]

    assert reports(run) == ["train: 8 prefixes of 3 steps computed", "heldout: 8 prefixes of 2 steps computed"]
    before = contents(tmp_path / "data/latents")
    shards = {
        f"{store}/{name}" for store in ("train", "heldout") for name in ("index.json", "00000.safetensors", "00001.safetensors")
    }
    features = {f"features/redness/{name}" for name in ("index.json", "00000.safetensors", "00001.safetensors")}
    assert before.keys() == shards | features
    assert reports(run) == ["train: 8 prefixes of 3 steps reused", "heldout: 8 prefixes of 2 steps reused"]
    assert contents(tmp_path / "data/latents") == before
    other_switch = run.model_copy(update={"sampler": config.SamplerConfig(switch_at=0.2)})
    assert reports(other_switch) == ["train: 8 prefixes of 3 steps reused", "heldout: 8 prefixes of 1 steps computed"]
    (tmp_path / "data/latents/train/00001.safetensors").unlink()
    assert reports(run)[0] == "train: 8 prefixes of 3 steps 1 of 2 shards computed, the others reused"
    assert contents(tmp_path / "data/latents") == before


@pytest.mark.parametrize(
    "other",
    [
        {"chain": {"guidance_scale": 2.0}},
        {"chain": {"scheduler": "euler"}},
        {"chain": {"num_inference_steps": 10}},
        {"train": {"num_inference_steps": 10}},
        {"train": {"switch_at": 0.8}},
        {"base": {"dtype": "bfloat16"}},
        {"base": {"resolution": 64}},
        {"prepare": {"dtype": "float16"}},
        {"prepare": {"shard_rows": 8}},
    ],
)
def test_a_cache_of_other_settings_is_stale(run: Config, tmp_path: Path, other: dict[str, Any]) -> None:
    prepare(run, tmp_path, CPU)
    with pytest.raises(StoreError, match="belongs to other prompts, base or settings"):
        read_train_latents(changed(run, other), tmp_path)


def test_a_cache_of_another_text_encoder_unet_or_scheduler_is_stale(run: Config, tmp_path: Path) -> None:
    """They are compared by their bytes; the path of the base does not matter."""
    prepare(run, tmp_path, CPU)
    copy = tmp_path / "copy"
    shutil.copytree(run.base.path, copy)
    elsewhere = changed(run, {"base": {"path": str(copy)}})
    read_train_latents(elsewhere, tmp_path)
    for part in (
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ):
        whole = (copy / part).read_bytes()
        (copy / part).write_bytes(whole[:-1] + b" ")
        with pytest.raises(StoreError, match="belongs to other prompts, base or settings"):
            read_train_latents(elsewhere, tmp_path)
        (copy / part).write_bytes(whole)


def test_text_features_are_keyed_by_the_rewards_bytes_not_its_path(run: Config, tmp_path: Path) -> None:
    def facts(**settings: str) -> str:
        reward = run.rewards["redness"].model_copy(update=settings)
        content = prepare_module._features_content(run.model_copy(update={"rewards": {"redness": reward}}), tmp_path, "redness")
        return content.key(0)

    for folder, text in (("one", "weights"), ("two", "weights"), ("three", "others")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(text)
    assert facts(path=str(tmp_path / "one")) == facts(path=str(tmp_path / "two"), licence="MIT")
    others = [
        facts(path=str(tmp_path / "three")),
        facts(tokenizer=str(tmp_path / "one")),
        facts(version="2"),
        facts(dtype="bfloat16"),
    ]
    assert len({facts(), facts(path=str(tmp_path / "one")), *others}) == 6


def test_prepare_computes_only_missing_shards(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second of two shards, it continues with the second and ends in the same bytes."""
    prepare(run, tmp_path, CPU)
    whole = contents(tmp_path / "data/latents")
    shutil.rmtree(tmp_path / "data/latents")
    prefix, drawn = Sampler.prefix, list[int]()

    def counted(self: Sampler, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        drawn.append(len(prompts))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return prefix(self, prompts, seeds)

    monkeypatch.setattr(Sampler, "prefix", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(run, tmp_path, CPU)
    assert drawn == [2, 2, 2]
    with pytest.raises(StoreError, match=r"train does not exist, or is not finished\. Run `textcraftor prepare`"):
        read_train_latents(run, tmp_path)
    prepare(run, tmp_path, CPU)
    assert drawn[3:] == [2, 2, 2, 2, 2, 2], "one shard of train, two of heldout, in batches of two"
    assert contents(tmp_path / "data/latents") == whole


def test_two_processes_prepare_the_same_bytes(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(run, tmp_path, CPU)
    alone = contents(tmp_path / "data/latents")
    shutil.rmtree(tmp_path / "data/latents")
    train, heldout = prepare_module._train_content(run, tmp_path), prepare_module._heldout_content(run, tmp_path)
    features = prepare_module._features_content(run, tmp_path, "redness")
    for name, content in {"_train_content": train, "_heldout_content": heldout, "_features_content": features}.items():
        monkeypatch.setattr(prepare_module, name, lambda *_, content=content: content)
    capfd.readouterr()
    in_processes(2, lambda: prepare(run, tmp_path, CPU))
    assert capfd.readouterr().err.count("prefixes of") == 2, "one of them speaks"
    assert contents(tmp_path / "data/latents") == alone


def relative_distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest relative distance of a row. Rounding, which depends on batch and processor, is far below 1e-4."""
    return float(((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).max())


def test_cached_latents_are_what_the_sampler_would_compute(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    table = train_table(run, tmp_path)
    prompts, seeds = table["prompt"].to_list(), table["seed"].to_list()
    sampler = Sampler(load_base(run.base, CPU), run.chain, run.train.switch_at)
    stored = read_train_latents(run, tmp_path)
    assert relative_distance(stored[:], sampler.prefix(prompts, seeds)) <= 1e-4
    batch = slice(2, 4)  # as `prepare` drew it
    assert torch.equal(stored[batch], sampler.prefix(prompts[batch], seeds[batch]))
    assert torch.equal(stored[batch], InlinePrefixes(sampler, table)[[2, 3]]), "inline: the same batch, the same bits"
    assert relative_distance(stored[[5, 2, 7]], InlinePrefixes(sampler, table)[[5, 2, 7]]) <= 1e-4
    assert relative_distance(stored[[5, 2, 7]], stored[[5, 7, 2]]) > 0.1, "other rows differ"
    half = changed(run, {"prepare": {"dtype": "float16"}})
    prepare(half, tmp_path, CPU)
    assert torch.equal(read_train_latents(half, tmp_path)[:], stored_rows(run, tmp_path, sampler).half())
    assert read_heldout_latents(half, tmp_path).row_format.dtype == "float32"


def test_diversity_is_trained_on_several_images_of_each_prompt(run: Config, tmp_path: Path) -> None:
    variety = {"kind": "diversity", "path": str(Path(__file__).parents[2] / "data/tiny/rewards/clip")}
    several = {"images_per_prompt": 2, "batch_size": 4, "decode_size": 2, "steps": 32, "learning_rate": 2e-3}
    values = {"rewards": {"variety": variety}, "mix": {"redder": {"redness": 0.0, "variety": 1.0}}, "train": several}
    run = changed(run, values)
    prepare(run, tmp_path, CPU)
    table = train_table(run, tmp_path)
    assert table["prompt"][::2].equals(table["prompt"][1::2]) and table["seed"].n_unique() == 2 * table["prompt"].n_unique()
    made = train_text_encoder(run, "redder", tmp_path, CPU)
    history = pl.read_csv(made / "history.csv")["variety"]
    assert history[:8].mean() < history[-8:].mean()


def stored_rows(run: Config, root: Path, sampler: Sampler) -> torch.Tensor:
    """The rows that `prepare` computes, batch by batch."""
    rows = InlinePrefixes(sampler, train_table(run, root))
    return torch.cat([rows[slice(start, start + 2)] for start in range(0, 8, 2)])


def test_training_inline_takes_the_same_steps_and_stores_nothing(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    cached = train_text_encoder(run, "redder", tmp_path, CPU)
    expected = load_file(cached / "text_encoder/model.safetensors"), (cached / "history.csv").read_text()
    heldout = contents(tmp_path / "data/latents/heldout")
    inline = changed(run, {"prepare": {"mode": "inline"}})
    prepare(inline, tmp_path, CPU)
    assert contents(tmp_path / "data/latents/heldout") == heldout
    left = {name for name in contents(tmp_path / "data/latents") if not name.startswith("heldout/")}
    assert left == {"train/index.json", "features/index.json"}
    with pytest.raises(StoreError, match=r"not the index of a store\. Run `textcraftor prepare`"):
        read_train_latents(run, tmp_path)
    out = train_text_encoder(inline, "redder", tmp_path, CPU)
    for name, value in load_file(out / "text_encoder/model.safetensors").items():
        torch.testing.assert_close(value, expected[0][name], atol=1e-5, rtol=1e-5)
    steps = [
        [list(map(float, line.split(","))) for line in text.splitlines()[1:]]
        for text in (expected[1], (out / "history.csv").read_text())
    ]
    torch.testing.assert_close(torch.tensor(steps[0]), torch.tensor(steps[1]), atol=1e-5, rtol=1e-5)
    prepare(run, tmp_path, CPU)
    assert read_train_latents(run, tmp_path).shape == (8, 4, 4, 4)


def test_inline_text_features_use_the_precision_of_prepare(run: Config, tmp_path: Path) -> None:
    lower = changed(run, {"prepare": {"mode": "inline"}, "train": {"reward_dtype": "bfloat16"}})
    sampler = Sampler(load_base(run.base, CPU), run.chain, run.train.switch_at)
    train_set, rewards = _load_data(lower, lower.train, ["redness"], tmp_path, sampler)
    reader = train_set.text_features["redness"].reward
    assert (rewards["redness"].dtype, reader.dtype) == (torch.bfloat16, torch.float32)


def test_too_little_disk_space_is_an_error_before_anything_is_computed(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    drawn = list[int]()
    prefix = Sampler.prefix
    monkeypatch.setattr(Sampler, "prefix", lambda self, *rows: drawn.append(1) or prefix(self, *rows))
    of(4096)
    with pytest.raises(StoreError, match=r"data/latents needs 0\.0 GB more for 16 prefixes.*prepare\.mode: inline"):
        prepare(run, tmp_path, CPU)
    assert not drawn
    of(16 * 4 * 4 * 4 * 4 + 16 * 32 + 4 * 400 + 4 * 256)  # rows, digests, headers, and one shard beside them
    prepare(run, tmp_path, CPU)
    of(4 * 256)
    prepare(run, tmp_path, CPU)  # what is there needs no more space than to replace a shard


def test_a_damaged_cache_is_never_trained_on_and_recomputed(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    before = contents(tmp_path / "data/latents")
    for name in ("train/00001.safetensors", "features/redness/00000.safetensors"):
        path = tmp_path / "data/latents" / name
        whole, rows = path.read_bytes(), load_file(path)["rows"].nbytes
        flipped = whole[:-rows] + bytes(byte ^ 1 for byte in whole[-rows:])  # each row, for so short a run meets but a few
        for bad in (whole[: len(whole) // 2], flipped, b""):
            path.write_bytes(bad)
            with pytest.raises(StoreError, match=r"is damaged.*Run `textcraftor prepare`"):
                train_text_encoder(run, "redder", tmp_path, CPU)
            prepare(run, tmp_path, CPU)
            assert contents(tmp_path / "data/latents") == before


def test_leftovers_of_earlier_runs_are_removed(run: Config, tmp_path: Path) -> None:
    """The folder is a DVC output: the same inputs must give the same files."""
    prepare(run, tmp_path, CPU)
    before = contents(tmp_path / "data/latents")
    (tmp_path / "data/latents/train.safetensors").write_bytes(b"a cache of an earlier version")
    (tmp_path / "data/latents/features/other").mkdir()
    (tmp_path / "data/latents/features/other/index.json").write_text("{}")
    prepare(run, tmp_path, CPU)
    assert contents(tmp_path / "data/latents") == before


def test_training_writes_an_artifact_with_its_proof_and_is_reproducible(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    out = train_text_encoder(run, "redder", tmp_path, CPU)
    made = contents(out)
    assert {"text_encoder/model.safetensors", "history.csv", "proof.json", "grids/step_000002.png"} <= made.keys()
    proof = json.loads(made["proof.json"])
    assert proof["config"]["mix"] == {"redness": 1.0} and {"prompts", "latents"} <= proof["inputs"].keys()
    assert not any((tmp_path / ".textcraftor/training").iterdir()), "the state to resume from is gone once it is done"
    assert contents(train_text_encoder(run, "redder", tmp_path, CPU)) == made


def test_every_layer_of_the_encoder_is_trained(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    tuned = load_file(train_text_encoder(run, "redder", tmp_path, CPU) / "text_encoder/model.safetensors")
    frozen = load_base(run.base, CPU).text_encoder.state_dict()
    changed = {name for name, value in tuned.items() if not torch.equal(value, frozen[name.removeprefix("text_model.")])}
    assert any("layers.0" in name for name in changed) and any("layers.1" in name for name in changed)


def test_prefixes_have_the_resolution_of_the_base(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    assert read_train_latents(run, tmp_path).shape == (8, 4, 4, 4)
    larger = changed(run, {"base": {"resolution": 64}})
    prepare(larger, tmp_path, CPU)
    assert read_train_latents(larger, tmp_path).shape == (8, 4, 8, 8)


def test_sdxl_in_bfloat16_with_both_encoders_and_a_multistep_solver(
    run: Config, family_folders: dict[str, Path], tmp_path: Path
) -> None:
    """From prefixes with the solver's history over two encoders in one run and the UNet to an image."""
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
        tuned = load_file(out / name / "model.safetensors")
        frozen = {key.removeprefix("text_model."): value for key, value in base.encoders[name].state_dict().items()}
        assert any(not torch.equal(value, frozen[key.removeprefix("text_model.")]) for key, value in tuned.items()), name
    train_unet(xl, "redder", tmp_path, CPU)
    candidate = Candidate.find("redder-unet", tmp_path)
    assert set(candidate.parts) == {"text_encoder", "text_encoder_2", "unet"}
    draw(xl, candidate, "a red circle", 0, tmp_path / "drawn.png", CPU)
    assert (tmp_path / "drawn.png").is_file()


def test_training_without_prepare_says_what_to_do(run: Config, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"features.redness does not exist, or is not finished\. Run `textcraftor prepare`"):
        train_text_encoder(run, "redder", tmp_path, CPU)


def test_a_failed_run_keeps_the_last_artifact_and_its_checkpoint(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(run, tmp_path, CPU)
    before = contents(train_text_encoder(run, "redder", tmp_path, CPU))
    steps = iter([1.0, float("nan")])
    from tests.fixtures import Redness

    score = Redness.score
    monkeypatch.setattr(Redness, "score", lambda self, *inputs: score(self, *inputs) * next(steps))
    with pytest.raises(TrainingError, match="redness is not finite"):
        train_text_encoder(run, "redder", tmp_path, CPU)
    assert contents(tmp_path / "data/encoders/redder") == before
    assert list((tmp_path / ".textcraftor/training").rglob("checkpoint.safetensors"))
