"""The recipe at toy size: it builds every artifact, resumes after an interruption, and is reproducible."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from textcraftor.errors import TrainingError, UserError
from textcraftor.tiny.language import plain_caption
from textcraftor.tiny.recipe import batches, validation
from textcraftor.tiny.recipe.build import STEPS, RecipeSettings, build
from textcraftor.tiny.recipe.contrastive import ATTRIBUTES, scene_attributes
from textcraftor.tiny.recipe.degradation import degrade
from textcraftor.tiny.recipe.files import replace_folder
from textcraftor.tiny.recipe.fit import MatrixMuon, Schedule, fit, generator
from textcraftor.tiny.recipe.preferences import GROUP_H, fidelity, sample_rendered_pairs
from textcraftor.tiny.scenes import Scene, change_one_attribute

CPU = torch.device("cpu")


def toy_schedule(batch: int = 4, steps: int = 2) -> Schedule:
    return Schedule(steps=steps, batch=batch, peak_lr=1e-3, ema=0.9, save_every=1)


TOY_SETTINGS = RecipeSettings(
    training_images=8,
    drawn_prompts=2,
    heldout_drawn_prompts=2,
    drawing_steps=1,
    validation_prompts=4,
    autoencoder=toy_schedule(2),
    autoencoder_decoder=toy_schedule(2),
    text_encoder=toy_schedule(),
    reading=toy_schedule(),
    unet=toy_schedule(steps=4),  # the base is kept after two parts of them
    unet_last=toy_schedule(),
    attributes=toy_schedule(),
    image_attributes=toy_schedule(),
    towers=toy_schedule(),
    fine_tuning=toy_schedule(),
    preferences=toy_schedule(),
    aesthetic=toy_schedule(),
)


def read_weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_build_makes_every_artifact_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "STEPS", 2)  # of the sampler; 25 take longer than all trainings
    out, work = tmp_path / "out", tmp_path / "work"
    assert build(out, work, device="cpu", settings=TOY_SETTINGS) == list(STEPS)
    for name in STEPS:
        assert (out / name).exists()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "| plain prompts |" in card
    assert (out / "samples.png").stat().st_size > 1000
    assert not list(out.rglob("*.part*"))
    for config in (out / "base/text_encoder", out / "rewards/pickscore", out / "rewards/aesthetic"):
        assert json.loads((config / "config.json").read_text())["dtype"] == "float32", "what transformers loads it in"
    before = read_weights(out)
    assert build(out, work, device="cpu", settings=TOY_SETTINGS) == []
    assert read_weights(out) == before


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    step = ["rewards/aesthetic"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert build(tmp_path / name, tmp_path / f"work-{name}", seed, "cpu", step, TOY_SETTINGS) == step
    a, b, c = (read_weights(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_unknown_steps_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown step 'rewards/hps'.*rewards/hpsv2"):
        build(tmp_path / "out", tmp_path / "work", device="cpu", steps=["rewards/hps"])
    assert not (tmp_path / "out").exists()


def regression() -> tuple[nn.Module, Callable[[np.random.Generator], Tensor]]:
    """A small model and its loss on random inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss_at(rng: np.random.Generator) -> Tensor:
        inputs = torch.from_numpy(rng.standard_normal((16, 4))).float()
        return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()

    return model, loss_at


@pytest.mark.parametrize("muon_lr", [0.0, 1e-2])
def test_fit_resumes_to_the_same_weights(tmp_path: Path, muon_lr: float) -> None:
    schedule = Schedule(steps=12, batch=16, peak_lr=1e-2, muon_lr=muon_lr, ema=0.9, save_every=4)
    uninterrupted, loss_at = regression()
    fit("toy", uninterrupted, loss_at, schedule, tmp_path / "uninterrupted.pt", seed=0)

    killed, loss_at = regression()
    calls = 0

    def interrupted(rng: np.random.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return loss_at(rng)

    with pytest.raises(KeyboardInterrupt):
        fit("toy", killed, interrupted, schedule, tmp_path / "interrupted.pt", seed=0)
    resumed, loss_at = regression()
    fit("toy", resumed, loss_at, schedule, tmp_path / "interrupted.pt", seed=0)
    for expected, got in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_muon_moves_convolutions_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(2, 2, 5, 5)).square().mean().backward()
    muon = MatrixMuon([model[0].weight], lr=1e-2, weight_decay=0.0)
    muon.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False]
    change = (model[0].weight - before[0]).flatten(1)
    assert torch.linalg.svdvals(change).max() < 2 * torch.linalg.svdvals(change).min(), "Muon's steps are nearly orthogonal"


def test_fit_reduces_the_loss_and_stops_at_a_nan_gradient(tmp_path: Path) -> None:
    model, loss_at = regression()
    before = loss_at(generator(1, "probe")).item()
    fit("toy", model, loss_at, Schedule(300, 16, 2e-2, ema=0.9), tmp_path / "toy.pt", seed=0)
    assert loss_at(generator(1, "probe")).item() < 0.5 * before
    with pytest.raises(TrainingError, match="gradient is nan at step 0"):
        fit("bad", model, lambda rng: loss_at(rng) * float("nan"), Schedule(2, 16, 1e-2), tmp_path / "bad.pt", seed=0)
    assert not (tmp_path / "bad.pt").exists()


def test_hard_negatives_have_other_attributes() -> None:
    batch = batches.with_negatives(batches.sample_scenes(32, rng := np.random.default_rng(0)), rng)
    attributes = scene_attributes(batch)
    assert attributes.shape == (64, ATTRIBUTES)
    assert (attributes[:32] != attributes[32:]).any(1).all()
    assert ((attributes[:32] != attributes[32:]).sum(1) <= 12).all()  # most for two objects that swap colours


def test_caption_kinds_have_the_requested_frequencies() -> None:
    rng = np.random.default_rng(0)
    batch = batches.sample_scenes(400, rng)
    plain = batches.sample_captions(batch, rng, rich=0.0)
    assert plain == [plain_caption(scene) for scene in batch]
    mixed = batches.sample_captions(batch, rng, rich=0.5, empty=0.2)
    assert 50 < sum(caption == "" for caption in mixed) < 110
    assert 130 < sum(caption in plain for caption in mixed) < 210


def test_degrade_changes_about_half_of_a_copy_and_stays_in_range() -> None:
    rng = np.random.default_rng(0)
    images = batches.render_batch(batches.sample_scenes(64, rng), rng)
    original = images.clone()
    degraded = degrade(images, rng)
    assert torch.equal(images, original)
    assert degraded.min() >= 0 and degraded.max() <= 1
    changed = (degraded != images).flatten(1).any(1).float().mean()
    assert 0.25 < changed < 0.75


def test_fidelity_and_preference_pairs() -> None:
    rng = np.random.default_rng(0)
    scene = batches.sample_scenes(1, rng)[0]
    assert fidelity(scene, scene) == 1
    assert 0.5 < fidelity(change_one_attribute(scene, rng), scene) < 1
    pairs = sample_rendered_pairs(GROUP_H, 200, rng, CPU)
    assert pairs.images.shape == (200, 2, 3, 64, 64)
    assert 70 < int(pairs.chosen.sum()) < 130


def test_replace_folder_keeps_the_old_folder_on_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replace_folder(folder) as temporary:
        (temporary / "file").write_text("old")

    def fail() -> None:
        with replace_folder(folder) as temporary:
            (temporary / "file").write_text("incomplete")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert (folder / "file").read_text() == "old"


def test_only_pairs_have_a_relation() -> None:
    scenes: list[Scene] = batches.sample_scenes(500, np.random.default_rng(0))
    assert 200 < sum(len(scene.objects) == 2 for scene in scenes) < 400
    for scene in scenes:
        assert (scene.relation is None) == (len(scene.objects) == 1)
