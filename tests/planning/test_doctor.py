"""Tests of `doctor`, of plans and of the dry run, on the shipped tiny profile and on SD 1.5, whose weights are missing."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from textcraftor import cli
from textcraftor.bench.meters import peak_bytes
from textcraftor.config import PROFILES, TrainConfig, load
from textcraftor.fetch import LOCK, fetch, required_files
from textcraftor.models.base import load_base
from textcraftor.planning import doctor, footprint, plan
from textcraftor.planning.doctor import Finding, examine
from textcraftor.training.stages import encoder_parts, in_one_module

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["textcraftor", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return int(stop.value.code or 0), " ".join(printed.out.split()), printed.err


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_nothing_is_missing_for_the_shipped_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status, out, _ = run(monkeypatch, capsys, "doctor", "--profile", "tiny")
    assert status == 0, out
    assert "missing" not in out and "data/tiny/base" in out and "time 1,000 samples" in out


def test_missing_downloads_are_listed_with_size_licence_and_source_and_exit_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no params.yaml either: the profile is enough
    found: dict[str, Finding] = {}

    def keeping(*arguments: Any) -> list[Finding]:
        findings = examine(*arguments)
        found.update(by_name(findings))
        return findings

    monkeypatch.setattr(doctor, "examine", keeping)
    status, out, _ = run(monkeypatch, capsys, "doctor", "--profile", "sd15")
    assert status == 1
    for text in (
        "4.3 GB",
        "CreativeML",
        "stable-diffusion-v1-5/stable-diffusion-v1-5 at 451f4fe",
        "textcraftor fetch",
        "OpenPrompts",
    ):
        assert text in out, text
    assert found["download hpsv2"].state == "missing" and found["library torch"].state == "ok"
    memory = next(finding for name, finding in found.items() if name.startswith("memory"))
    assert 10 < float(memory.size.split()[0]) < 200


def test_a_file_that_changed_is_wrong(tmp_path: Path) -> None:
    content, local = b"a red circle\n", tmp_path / "local"
    (local / "mine").mkdir(parents=True)
    (local / "mine/prompts.txt").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    item = {"to": "weights/mine", "url": "http://nowhere/prompts.txt", "files": {"prompts.txt": sha256}}
    config = load(ROOT / "params.yaml", {"downloads": {"mine": item}})
    list(fetch(config, tmp_path, folder=local))
    assert by_name(examine(config, tmp_path, CPU))["download mine"].state == "ok"
    (tmp_path / "weights/mine/prompts.txt").write_bytes(b"a RED circle\n")
    assert by_name(examine(config, tmp_path, CPU))["download mine"].state == "ok", "only the size is compared without verify"
    assert by_name(examine(config, tmp_path, CPU, verify=True))["download mine"].state == "wrong"
    assert json.loads((tmp_path / LOCK).read_text())["weights/mine/prompts.txt"]["sha256"] == sha256


def test_profiles_name_only_files_they_download_into_folders_named_after_the_pin() -> None:
    for name in ("sd15", "sd21", "sdxl"):
        config = load("none", profile=name)
        files = {str(required.path) for required in required_files(config)}
        folders = {download.to for download in config.downloads.values()}
        for reward in config.rewards.values():
            for path in filter(None, (reward.path, reward.head, reward.tokenizer)):
                assert path in files | folders, (name, path)
        assert config.base.path in folders
        for download in config.downloads.values():
            if download.to.startswith("weights/"):
                pin = download.revision or download.url
                assert download.to.rpartition("-")[2] in pin, "another pin is another folder, and so another parameter for DVC"


def test_the_sd15_profile_has_the_settings_of_the_paper() -> None:
    config = load("none", profile="sd15")
    train, gate = config.train, {(rule.judge, rule.metric): rule.at_least for rule in config.gate.rules}
    assert (train.batch_size * train.accumulation, train.steps, train.learning_rate, train.grad_steps) == (256, 10_000, 1e-6, 5)
    assert (config.chain.num_inference_steps, config.chain.guidance_scale, config.base.resolution) == (25, 7.5, 512)
    assert round((1 - config.sampler.switch_at) * 25) == 15 and round((1 - train.switch_at) * 25) == 5
    assert config.mix["paper"] == {"clip": 100, "aesthetic": 1, "pickscore": 1, "hpsv2": 100}
    assert gate["aesthetic", "mean"] == 5.88 and gate["hpsv2", "mean"] == 0.2805 and gate["pickscore_bxb", "mean"] == 19.157
    assert config.rewards["hpsv2"].version == "2.0"
    assert "imagereward" not in config.mix["paper"], "the held-out judge"


def test_a_plan_multiplies_batch_work_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    paper = {"gradient": "truncated", "grad_steps": 5, "num_inference_steps": 25, "switch_at": 0.8}
    small = {**paper, "batch_size": 3, "accumulation": 4, "ema_decay": 0, "interpolation": 1}
    made = plan.plan(load(ROOT / "params.yaml", {"train": small}), "balanced", ROOT)
    again = load(ROOT / "params.yaml", {"train": {**paper, "gradient_checkpointing": True, "batch_size": 24}})
    checkpointed = plan.plan(again, "balanced", ROOT)
    assert made is not None and checkpointed is not None
    assert made.batch == 24 and made.work.total == 10 and checkpointed.work.total == 15  # forwards; the published code: 40
    assert checkpointed.memory["UNet activations"] / 24 == pytest.approx(made.memory["UNet activations"] / 3 / 5)
    assert made.memory["tuned copy, gradient, AdamW"] == 16 * made.trainable
    assert made.seconds(10, 1e12) == pytest.approx(10 * sum(made.flops.values()) / (1e12 * plan.EFFICIENCY))


def test_a_dry_run_trains_on_one_batch_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny").symlink_to(ROOT / "data/tiny")
    (tmp_path / "params.yaml").write_text(
        "profile: tiny\ntrain: {batch_size: 2, gradient: truncated, grad_steps: 5, num_inference_steps: 25, switch_at: 0.8}\n"
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(monkeypatch, capsys, "train", "--mix", "balanced", "--dry-run")
    assert status == 0, err
    assert "2 (micro) x 1 (accumulation) x 1 (processes) = 2" in out and "10 a sample" in out
    assert "One micro batch of 2" in out and "gradient norm" in out and "truncated by the base's tokenizer" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_without_weights_prints_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, "train", "--profile", "sd15", "--mix", "paper", "--dry-run")
    assert status == 0, err
    assert "123,060,480" in out and "= 256" in out and "15 a sample" in out and "No batch was run" in out
    status, _, err = run(monkeypatch, capsys, "train", "--profile", "sd15", "--mix", "paper")
    assert status == 2 and "textcraftor fetch --profile sd15" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_profile_ignores_the_overrides_in_params(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("profile: tiny\nmixes: [aesthetic]\ntrain: {steps: 7}\n")
    assert load(params, profile="tiny").train.steps == 7
    assert load(params, profile="sd15").train.steps == 10_000
    assert {path.stem for path in PROFILES.glob("*.yaml")} >= {"tiny", "sd15", "sd21", "sdxl"}


@pytest.mark.parametrize(
    ("gradient", "forwards", "graphs"),
    [("truncated", 4 + 2, 2), ("random", 4 + 2, 2), ("one_step", 4 + 1, 1), ("stop_gradient", 4 + 2 + 2, 1)],
)
def test_the_planned_work_is_what_each_gradient_variant_runs(gradient: str, forwards: int, graphs: int) -> None:
    """K = 2 of the four steps after the switch; tests/training/test_objective.py counts the calls."""
    tune = TrainConfig(gradient=gradient, grad_steps=2)
    work = plan.unet_work(tune, 4)
    assert (work.total, work.graphs) == (forwards, graphs)
    assert plan.unet_work(tune, 4, before=20).total == forwards + 20


PLAIN = {"decode_size": None, "ema_decay": 0, "interpolation": 1}


def test_settings_that_reduce_memory_reduce_the_planned_memory() -> None:
    def memory(**train: object) -> dict[str, float]:
        made = plan.plan(load(ROOT / "params.yaml", {"train": {**PLAIN, "batch_size": 8, **train}}), "balanced", ROOT)
        assert made is not None
        return made.memory

    plain, sliced, halved = memory(), memory(decode_size=2), memory(reward_dtype="bfloat16")
    for part in ("VAE activations", "reward activations"):
        assert sliced[part] == plain[part] / 4
    assert halved["reward towers"] == plain["reward towers"] / 2
    assert memory(ema_decay=0.9)["tuned copy, gradient, AdamW"] == plain["tuned copy, gradient, AdamW"] * 20 / 16
    assert memory(interpolation=0.5)["tuned copy, gradient, AdamW"] == plain["tuned copy, gradient, AdamW"] * 24 / 16


def test_the_trainable_parameters_of_a_plan_are_those_of_the_run() -> None:
    run = load(ROOT / "params.yaml", {"train": {"method": "lora", "lora_rank": 3, "negative_embedding": True}})
    made = plan.plan(run, "balanced", ROOT)
    parts = in_one_module(encoder_parts(load_base(run.base.at(ROOT), CPU), run.train))
    assert made is not None
    assert made.trainable == sum(parameter.numel() for parameter in parts.parameters() if parameter.requires_grad)


def test_the_estimate_for_vae_checkpointing_is_near_the_measured_peak() -> None:
    """Peak memory of a real decoder in forward and backward pass, with and without checkpointing by blocks."""
    architecture = {
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    cost = footprint.vae_cost(architecture, 32, torch.float32)
    vae = AutoencoderKL.from_config(architecture).requires_grad_(False)
    latents = torch.randn(1, 4, 32, 32)

    def step() -> None:
        leaf = latents.clone().requires_grad_()
        vae.decode(leaf).sample.sum().backward()

    plain = peak_bytes(step, CPU)
    vae.enable_gradient_checkpointing()
    vae.train()  # the decoder has no layer that behaves differently in this mode
    checkpointed = peak_bytes(step, CPU)
    assert cost.saved == pytest.approx(plain, rel=0.35)
    assert cost.kept + cost.recomputed == pytest.approx(checkpointed, rel=0.35)
    assert checkpointed < 0.8 * plain
