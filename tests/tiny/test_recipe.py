"""The recipe at toy size: it builds every artifact, goes on where it stopped, and repeats itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from textcraftor.errors import TrainingError, UserError
from textcraftor.tiny.recipe import corpus
from textcraftor.tiny.recipe.build import STEPS, Plan, build
from textcraftor.tiny.recipe.contrast import FACTS, facts
from textcraftor.tiny.recipe.damage import damage
from textcraftor.tiny.recipe.files import folder_aside
from textcraftor.tiny.recipe.fit import Schedule, fit, generator
from textcraftor.tiny.recipe.preferences import GROUP_H, fidelity, hold_ballot
from textcraftor.tiny.scenes import Scene, change_one

CPU = torch.device("cpu")


def toy(batch: int = 4) -> Schedule:
    return Schedule(steps=2, batch=batch, peak_lr=1e-3, ema=0.9, save_every=1)


TOY_PLAN = Plan(
    pictures=8,
    judged=8,
    vae=toy(2),
    vae_things=toy(2),
    decoder=toy(2),
    text_encoder=toy(),
    unet_at_last=toy(),
    unet_again=toy(),
    unet=toy(),
    towers=toy(),
    settling=toy(),
    preferences=toy(),
    aesthetic=toy(),
)


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_build_makes_everything_once(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    assert build(out, work, device="cpu", plan=TOY_PLAN) == list(STEPS)
    for name in STEPS:
        assert (out / name).exists()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "| plain prompts |" in card
    assert (out / "samples.png").stat().st_size > 1000
    assert not list(out.rglob("*.part*"))
    before = fingerprint(out)
    assert build(out, work, device="cpu", plan=TOY_PLAN) == []
    assert fingerprint(out) == before


def test_build_repeats_itself(tmp_path: Path) -> None:
    step = ["rewards/heldout"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert build(tmp_path / name, tmp_path / f"work-{name}", seed, "cpu", step, TOY_PLAN) == step
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown step 'rewards/hps'.*rewards/hpsv2"):
        build(tmp_path / "out", tmp_path / "work", device="cpu", steps=["rewards/hps"])
    assert not (tmp_path / "out").exists()


def lesson() -> tuple[nn.Module, Callable[[np.random.Generator], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss_at(rng: np.random.Generator) -> Tensor:
        inputs = torch.from_numpy(rng.standard_normal((16, 4))).float()
        return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()

    return model, loss_at


def test_fit_resumes_to_the_same_weights(tmp_path: Path) -> None:
    schedule = Schedule(steps=12, batch=16, peak_lr=1e-2, ema=0.9, save_every=4)
    whole, loss_at = lesson()
    fit("toy", whole, loss_at, schedule, tmp_path / "whole.pt", seed=0)

    broken, loss_at = lesson()
    calls = 0

    def interrupted(rng: np.random.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return loss_at(rng)

    with pytest.raises(KeyboardInterrupt):
        fit("toy", broken, interrupted, schedule, tmp_path / "broken.pt", seed=0)
    resumed, loss_at = lesson()
    fit("toy", resumed, loss_at, schedule, tmp_path / "broken.pt", seed=0)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fit_learns_and_stops_at_nonsense(tmp_path: Path) -> None:
    model, loss_at = lesson()
    before = loss_at(generator(1, "probe")).item()
    fit("toy", model, loss_at, Schedule(300, 16, 2e-2, ema=0.9), tmp_path / "toy.pt", seed=0)
    assert loss_at(generator(1, "probe")).item() < 0.5 * before
    with pytest.raises(TrainingError, match="gradient is nan at step 0"):
        fit("bad", model, lambda rng: loss_at(rng) * float("nan"), Schedule(2, 16, 1e-2), tmp_path / "bad.pt", seed=0)
    assert not (tmp_path / "bad.pt").exists()


def test_twins_differ_and_facts_tell_them_apart() -> None:
    batch = corpus.twins(64, np.random.default_rng(0))
    table = facts(batch)
    assert table.shape == (64, FACTS)
    assert (table[:32] != table[32:]).any(1).all()
    assert ((table[:32] != table[32:]).sum(1) <= 12).all()  # most for two things that swap colours


def test_captions_are_mixed_as_asked() -> None:
    rng = np.random.default_rng(0)
    batch = corpus.scenes(400, rng)
    plain = corpus.captions(batch, rng, rich=0.0)
    assert plain == [corpus.plain_caption(scene) for scene in batch]
    mixed = corpus.captions(batch, rng, rich=0.5, empty=0.2)
    assert 50 < sum(caption == "" for caption in mixed) < 110
    assert 130 < sum(caption in plain for caption in mixed) < 210


def test_damage_spoils_some_and_stays_in_range() -> None:
    rng = np.random.default_rng(0)
    images = corpus.pictures(corpus.scenes(64, rng), rng)
    kept = images.clone()
    spoiled = damage(images, rng)
    assert torch.equal(images, kept)
    assert spoiled.min() >= 0 and spoiled.max() <= 1
    touched = (spoiled != images).flatten(1).any(1).float().mean()
    assert 0.25 < touched < 0.75


def test_annotators_like_what_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    scene = corpus.scenes(1, rng)[0]
    assert fidelity(scene, scene) == 1
    assert 0.5 < fidelity(change_one(scene, rng), scene) < 1
    ballot = hold_ballot(GROUP_H, 200, rng, CPU)
    assert ballot.images.shape == (200, 2, 3, 64, 64)
    assert 70 < int(ballot.chosen.sum()) < 130


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with folder_aside(folder) as aside:
        (aside / "a").write_text("whole")

    def spoil() -> None:
        with folder_aside(folder) as aside:
            (aside / "a").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        spoil()
    assert (folder / "a").read_text() == "whole"


def test_scenes_hold_what_they_promise() -> None:
    batch: list[Scene] = corpus.scenes(500, np.random.default_rng(0))
    assert 200 < sum(len(scene.things) == 2 for scene in batch) < 400
    for scene in batch:
        assert (scene.relation is None) == (len(scene.things) == 1)
