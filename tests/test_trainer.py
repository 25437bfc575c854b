"""The loop: it raises the reward, resumes to the same bytes, accumulates rightly and stops on what is not finite."""

import copy
from pathlib import Path

import pytest
import torch

from textcraftor.config import TuneConfig
from textcraftor.errors import TrainingError
from textcraftor.models import Base, TunedModel
from textcraftor.rewards import RewardMix
from textcraftor.sampler import Sampler
from textcraftor.trainer import Trainer
from textcraftor.trainset import TrainSet

from .conftest import CHAIN, Redness

PROMPTS = [f"a small {colour} circle" for colour in ("red", "green", "blue", "yellow", "purple", "cyan", "golden", "azure")]
SETTINGS = TuneConfig(grad_steps=1, steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2, grid_every=100)


def new_trainer(base: Base, tune: TuneConfig = SETTINGS, reward: Redness | None = None, switch_at: float = 0.8) -> Trainer:
    sampler = Sampler(base, CHAIN, switch_at)
    reward = reward or Redness()
    train_set = TrainSet(PROMPTS, sampler.prefix(PROMPTS, range(len(PROMPTS))), {"redness": reward.text_features(PROMPTS)})
    encoder = copy.deepcopy(base.text_encoder).requires_grad_(True)
    return Trainer(
        base, sampler, RewardMix({"redness": reward}, {"redness": 10.0}), train_set, tune, TunedModel(encoder), encoder
    )


def watched(trainer: Trainer) -> tuple[list[str], torch.Tensor]:
    return PROMPTS[:2], trainer.train_set.latents[:2]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


def test_training_raises_the_reward(base: Base, tmp_path: Path) -> None:
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "grad_steps": 5}
    trainer = new_trainer(base, SETTINGS.model_copy(update=settings), switch_at=0.0)
    history = trainer.fit(tmp_path, "key", watched(trainer))
    assert [record["step"] for record in history] == list(range(1, 13))
    assert history[-1]["redness"] > history[0]["redness"] + 1e-4
    assert history[-1]["loss"] == pytest.approx(-10 * history[-1]["redness"], rel=1e-5)


def test_a_resumed_run_ends_in_the_same_bytes(base: Base, tmp_path: Path) -> None:
    unbroken = new_trainer(base)
    expected = unbroken.fit(tmp_path / "unbroken", "key", watched(unbroken))

    class Killed(Exception):
        pass

    broken = new_trainer(base)
    loss, calls = broken.loss, []

    def dies_in_step_four(batch: TrainSet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls.append(batch)
        if len(calls) == 4:
            raise Killed
        return loss(batch)

    broken.loss = dies_in_step_four  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.fit(tmp_path / "broken", "key", watched(broken))
    resumed = new_trainer(base)
    history = resumed.fit(tmp_path / "broken", "key", watched(resumed))
    assert history == expected
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_checkpoint_of_another_run_is_not_resumed(base: Base, tmp_path: Path) -> None:
    first = new_trainer(base)
    first.fit(tmp_path, "one run", watched(first))
    other = new_trainer(base)
    fresh = new_trainer(base)
    assert other.fit(tmp_path, "another run", watched(other)) == fresh.fit(tmp_path / "x", "fresh", watched(fresh))


def test_accumulation_is_a_larger_batch(base: Base) -> None:
    """Batch 1 x accumulation 8 gives the gradient of 8 x 1."""
    large = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 8}))
    small = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 1, "accumulation": 8}))
    records = [trainer._accumulate_gradient(0) for trainer in (large, small)]
    assert records[0] == pytest.approx(records[1], rel=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in t.module.parameters()]) for t in (large, small)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_each_epoch_meets_every_prompt_once_in_an_order_of_its_own(base: Base) -> None:
    train_set = new_trainer(base).train_set
    epochs = [train_set.batch(start, 8, 0, base.device).prompts for start in (0, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PROMPTS) and epochs[0] != epochs[1]
    across = train_set.batch(6, 4, 0, base.device).prompts
    assert across == [*epochs[0][6:], *epochs[1][:2]]
    assert train_set.batch(0, 8, 1, base.device).prompts != epochs[0]


def test_a_reward_that_is_not_finite_stops_before_the_optimiser_and_is_named(base: Base, tmp_path: Path) -> None:
    broken = Redness()
    broken.scale.fill_(float("nan"))
    trainer = new_trainer(base, reward=broken)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="redness is not finite"):
        trainer.fit(tmp_path, "key", watched(trainer))
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_the_unet_is_tuned_on_the_frozen_encoder(base: Base, tmp_path: Path) -> None:
    trainer = new_trainer(base)
    encoder = trainer.tuned.text_encoder.requires_grad_(False)
    unet = copy.deepcopy(base.pipe.unet).requires_grad_(True)
    trainer.tuned, trainer.module = TunedModel(encoder, unet), unet
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trainer.fit(tmp_path, "key", watched(trainer))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    moved = [not torch.equal(ours, frozen) for ours, frozen in zip(unet.parameters(), base.pipe.unet.parameters(), strict=True)]
    assert any(moved)


def test_warmup_starts_slow(base: Base, tmp_path: Path) -> None:
    warm = new_trainer(base, SETTINGS.model_copy(update={"steps": 1, "warmup_steps": 100}))
    cold = new_trainer(base, SETTINGS.model_copy(update={"steps": 1}))
    moves = []
    for number, trainer in enumerate((warm, cold)):
        before = weights(trainer)
        trainer.fit(tmp_path / str(number), "key", watched(trainer))
        moves.append(sum((before[name] - value).abs().sum().item() for name, value in weights(trainer).items()))
    assert moves[0] == pytest.approx(moves[1] / 100, rel=0.05)


def test_sample_grids_are_drawn_while_training(base: Base, tmp_path: Path) -> None:
    trainer = new_trainer(base, SETTINGS.model_copy(update={"grid_every": 2}))
    trainer.fit(tmp_path, "key", watched(trainer))
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == [
        "step_000000.png",
        "step_000002.png",
        "step_000004.png",
    ]
