"""The training loop: it raises the reward, resumes to the same bytes, accumulates, and stops on non-finite values."""

import copy
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fixtures import CHAIN, Redness
from textcraftor.chain.sampler import Sampler
from textcraftor.config import TuneConfig
from textcraftor.errors import Preempted, TrainingError
from textcraftor.models.base import Base, TunedModel
from textcraftor.rewards import RewardMix
from textcraftor.training import trainer as module_under_test
from textcraftor.training.checkpoint import Progress
from textcraftor.training.data import Batch, TrainSet
from textcraftor.training.objective import Objective
from textcraftor.training.optimizer import adamw, rate_factor
from textcraftor.training.preemption import StopRequest
from textcraftor.training.trainer import Trainer

PROMPTS = [f"a small {colour} circle" for colour in ("red", "green", "blue", "yellow", "purple", "cyan", "golden", "azure")]
SETTINGS = TuneConfig(grad_steps=1, steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2, grid_every=100)


FACTS = {"run": "test"}
TOLERANCE = 1e-12  # relative, of gradients in float64. In float32 it would be of rounding, which is the processor's


class ContrastiveRedness(Redness):
    """Depends on every prompt of the step, as a contrastive reward does."""

    def score_rows(self, images: torch.Tensor, text_features: torch.Tensor, rows: slice) -> torch.Tensor:
        return self.score(images, text_features[rows]) * (text_features[rows, 0] / text_features[:, 0].square().sum())


def new_trainer(base: Base, tune: TuneConfig = SETTINGS, reward: Redness | None = None, switch_at: float = 0.8) -> Trainer:
    sampler = Sampler(base, CHAIN, switch_at)
    reward = reward or Redness()
    train_set = TrainSet(PROMPTS, sampler.prefix(PROMPTS, range(len(PROMPTS))), {"redness": reward.text_features(PROMPTS)})
    encoder = copy.deepcopy(base.text_encoder).requires_grad_(True)
    objective = Objective(base, sampler, RewardMix({"redness": reward}, {"redness": 10.0}), tune)
    return Trainer(objective, train_set, TunedModel(encoder), encoder)


def preview(trainer: Trainer) -> tuple[list[str], torch.Tensor]:
    return PROMPTS[:2], trainer.train_set.latents[:2]


def interrupted(trainer: Trainer, happens: Callable[[int], None]) -> Trainer:
    """The trainer, with `happens(step)` called at the beginning of each micro batch."""

    class Interrupted(Objective):
        def backward(self, batch: Batch, tuned: TunedModel, step: int, share: float = 1.0) -> dict[str, float]:
            happens(step)
            return super().backward(batch, tuned, step, share)

    trainer.objective = Interrupted(**vars(trainer.objective))
    return trainer


def gradient(trainer: Trainer) -> torch.Tensor:
    """The gradient of one step, summed over its micro batches, as one vector."""
    trainer._accumulate_gradients(Progress(), StopRequest())
    return torch.cat([p.grad.flatten() for p in trainer.module.parameters() if p.grad is not None])


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


def test_training_raises_the_reward(base: Base, tmp_path: Path) -> None:
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "grad_steps": 5}
    trainer = new_trainer(base, SETTINGS.model_copy(update=settings), switch_at=0.0)
    history = trainer.fit(tmp_path, FACTS, preview(trainer)).history
    assert [record["step"] for record in history] == list(range(1, 13))
    assert history[-1]["redness"] > history[0]["redness"] + 1e-4
    assert history[-1]["loss"] == pytest.approx(-10 * history[-1]["redness"], rel=1e-5)


def test_a_resumed_run_ends_in_the_same_bytes(base: Base, tmp_path: Path) -> None:
    unbroken = new_trainer(base)
    expected = unbroken.fit(tmp_path / "unbroken", FACTS, preview(unbroken)).history

    class Killed(Exception):
        pass

    def die_in_step_four(step: int) -> None:
        if step == 3:
            raise Killed

    broken = interrupted(new_trainer(base), die_in_step_four)
    with pytest.raises(Killed):
        broken.fit(tmp_path / "broken", FACTS, preview(broken))
    resumed = new_trainer(base)
    history = resumed.fit(tmp_path / "broken", FACTS, preview(resumed)).history
    assert history == expected
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_checkpoint_of_another_run_is_neither_resumed_nor_overwritten(base: Base, tmp_path: Path) -> None:
    first = new_trainer(base)
    first.fit(tmp_path, {"rate": 1}, preview(first))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    other = new_trainer(base)
    with pytest.raises(TrainingError, match=r"step 4 of another run \(rate: 1 -> 2\)"):
        other.fit(tmp_path, {"rate": 2}, preview(other))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("reward", [Redness, ContrastiveRedness])
def test_accumulation_equals_a_larger_batch(exact_base: Base, reward: type[Redness]) -> None:
    """Batch 1 x accumulation 8 gives the gradient of 8 x 1, also for a reward that uses the other prompts of the step."""
    large = new_trainer(exact_base, SETTINGS.model_copy(update={"batch_size": 8}), reward())
    small = new_trainer(exact_base, SETTINGS.model_copy(update={"batch_size": 1, "accumulation": 8}), reward())
    gradients = [gradient(trainer) for trainer in (large, small)]
    assert gradients[0].dtype == torch.float64
    assert (gradients[0] - gradients[1]).norm() <= TOLERANCE * gradients[0].norm()


def test_each_epoch_takes_every_prompt_once_in_its_own_order(base: Base) -> None:
    train_set = new_trainer(base).train_set
    epochs = [train_set.step(range(start, start + 8), 0, base.device).batch(0, 8).prompts for start in (0, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PROMPTS) and epochs[0] != epochs[1]
    across = train_set.step(range(6, 12), 0, base.device).batch(0, 4).prompts
    assert across == [*epochs[0][6:], *epochs[1][:2]]
    assert train_set.step(range(8), 1, base.device).batch(0, 8).prompts != epochs[0]


def test_the_images_of_a_prompt_stay_together(base: Base) -> None:
    one = new_trainer(base).train_set
    train_set = TrainSet(one.prompts, one.latents, one.text_features, images_per_prompt=2)
    for epoch in (0, 1):
        rows = train_set.step(range(8 * epoch, 8 * epoch + 8), 0, base.device).rows
        assert sorted(rows) == list(range(8))
        assert all(first % 2 == 0 and second == first + 1 for first, second in zip(rows[::2], rows[1::2], strict=True))


def test_a_nonfinite_reward_is_named_and_stops_the_run_before_the_update(base: Base, tmp_path: Path) -> None:
    broken = Redness()
    broken.scale.fill_(float("nan"))
    trainer = new_trainer(base, reward=broken)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="redness is not finite"):
        trainer.fit(tmp_path, FACTS, preview(trainer))
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_the_unet_is_tuned_on_the_frozen_encoder(base: Base, tmp_path: Path) -> None:
    trainer = new_trainer(base)
    encoder = trainer.tuned.text_encoder.requires_grad_(False)
    unet = copy.deepcopy(base.pipe.unet).requires_grad_(True)
    trainer.tuned, trainer.module = TunedModel(encoder, unet), unet
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trainer.fit(tmp_path, FACTS, preview(trainer))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    moved = [not torch.equal(ours, frozen) for ours, frozen in zip(unet.parameters(), base.pipe.unet.parameters(), strict=True)]
    assert any(moved)


def test_warmup_scales_the_first_step(base: Base, tmp_path: Path) -> None:
    warm = new_trainer(base, SETTINGS.model_copy(update={"steps": 1, "warmup_steps": 100}))
    cold = new_trainer(base, SETTINGS.model_copy(update={"steps": 1}))
    moves = []
    for number, trainer in enumerate((warm, cold)):
        before = weights(trainer)
        trainer.fit(tmp_path / str(number), FACTS, preview(trainer))
        moves.append(sum((before[name] - value).abs().sum().item() for name, value in weights(trainer).items()))
    assert moves[0] == pytest.approx(moves[1] / 100, rel=0.05)


def test_sample_grids_are_drawn_while_training(base: Base, tmp_path: Path) -> None:
    trainer = new_trainer(base, SETTINGS.model_copy(update={"grid_every": 2}))
    trainer.fit(tmp_path, FACTS, preview(trainer))
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == [
        "step_000000.png",
        "step_000002.png",
        "step_000004.png",
    ]


def test_sigterm_writes_a_checkpoint_between_micro_batches_and_the_run_resumes(base: Base, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 2, "accumulation": 2, "checkpoint_every": 100})
    unbroken = new_trainer(base, settings)
    expected = unbroken.fit(tmp_path / "unbroken", FACTS, preview(unbroken)).history

    def stop_in_step_three(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped after step 2; the checkpoint is written") as stop:
        preempted = interrupted(new_trainer(base, settings), stop_in_step_three)
        preempted.fit(tmp_path / "broken", FACTS, preview(preempted))
    assert stop.value.exit_status == 75 and signal.getsignal(signal.SIGTERM) is before
    resumed = new_trainer(base, settings)
    assert resumed.fit(tmp_path / "broken", FACTS, preview(resumed)).history == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(unbroken).items())


def out_of_memory_above(size: int, trainer: Trainer) -> Trainer:
    """The trainer on a simulated machine with memory for `size` samples."""

    class Small(Objective):
        def backward(self, batch: Batch, tuned: TunedModel, step: int, share: float = 1.0) -> dict[str, float]:
            if len(batch.prompts) > size:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().backward(batch, tuned, step, share)

    trainer.objective = Small(**vars(trainer.objective))
    return trainer


def test_out_of_memory_halves_the_micro_batch_once_and_reports_it(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = new_trainer(base, SETTINGS.model_copy(update={"batch_size": 2, "accumulation": 2}))
    expected = roomy.fit(tmp_path / "roomy", FACTS, preview(roomy)).history
    small = out_of_memory_above(2, new_trainer(base))
    history = small.fit(tmp_path / "small", FACTS, preview(small)).history
    assert "micro batches of 2 instead of 4, 2 instead of 1 a step" in " ".join(capsys.readouterr().err.split())
    assert history == expected
    assert all(torch.equal(value, weights(small)[name]) for name, value in weights(roomy).items())


def test_out_of_memory_twice_says_what_to_change(base: Base, tmp_path: Path) -> None:
    tiny = out_of_memory_above(1, new_trainer(base))
    with pytest.raises(TrainingError, match=r"no memory for a micro batch of 2\. Lower train\.batch_size"):
        tiny.fit(tmp_path, FACTS, preview(tiny))


def test_a_halved_micro_batch_is_kept_on_resuming(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = out_of_memory_above(2, new_trainer(base))
    first.fit(tmp_path, FACTS, preview(first))
    capsys.readouterr()
    again = out_of_memory_above(2, new_trainer(base))
    again.fit(tmp_path, FACTS, preview(again))
    assert "4 steps of 2 x 2 = 4 samples" in " ".join(capsys.readouterr().err.split())


def test_a_nonfinite_gradient_names_its_reward_and_keeps_the_last_good_state(base: Base, tmp_path: Path) -> None:
    steep = Redness()
    steep.score = lambda images, features: (images.mean((1, 2, 3)) * 0).sqrt()  # type: ignore[method-assign]
    trainer = new_trainer(base, SETTINGS.model_copy(update={"checkpoint_every": 100}), steep)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="gradient of reward redness is not finite"):
        trainer.fit(tmp_path, FACTS, preview(trainer))
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_the_moving_average_is_saved_and_resumed(base: Base, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"ema_decay": 0.5})
    seen: list[dict[str, torch.Tensor]] = []
    trainer = interrupted(new_trainer(base, settings), lambda step: seen.append(weights(trainer)))
    trainer.fit(tmp_path / "whole", FACTS, preview(trainer))
    plain = new_trainer(base)
    plain.fit(tmp_path / "plain", FACTS, preview(plain))
    seen.append(weights(plain))
    average = seen[0]
    for step, state in enumerate(seen[1:], start=1):
        decay = min(0.5, step / (step + 9))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in state.items()}
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, average[name])

    def stop_in_step_three(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        broken = interrupted(new_trainer(base, settings), stop_in_step_three)
        broken.fit(tmp_path / "broken", FACTS, preview(broken))
    resumed = new_trainer(base, settings)
    resumed.fit(tmp_path / "broken", FACTS, preview(resumed))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(trainer).items())


def test_interpolation_ends_part_of_the_way_from_the_starting_weights(base: Base, tmp_path: Path) -> None:
    plain, half = new_trainer(base), new_trainer(base, SETTINGS.model_copy(update={"interpolation": 0.5}))
    start = weights(plain)
    for trainer, folder in ((plain, "plain"), (half, "half")):
        trainer.fit(tmp_path / folder, FACTS, preview(trainer))
    for name, value in weights(half).items():
        torch.testing.assert_close(value, (start[name] + weights(plain)[name]) / 2)


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay: str, factors: list[float]) -> None:
    tune = TuneConfig(steps=6, warmup_steps=2, decay=decay)  # type: ignore[arg-type]
    assert [rate_factor(tune, step) for step in range(6)] == pytest.approx(factors, abs=1e-6)


def test_checkpoint_minutes_writes_before_checkpoint_every(base: Base, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every": 100, "checkpoint_minutes": 1e-9})
    found: list[bool] = []
    trainer = interrupted(
        new_trainer(base, settings), lambda step: found.append((tmp_path / "checkpoint.safetensors").exists())
    )
    trainer.fit(tmp_path, FACTS, preview(trainer))
    assert found == [False, True, True, True]


def test_the_moments_exist_before_the_first_backward_pass(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for them then shows in the backward pass, where the micro batch can be halved."""
    made: list[torch.optim.AdamW] = []
    found: list[int] = []
    monkeypatch.setattr(module_under_test, "adamw", lambda *arguments: made.append(adamw(*arguments)) or made[-1])
    trainer = interrupted(new_trainer(base), lambda step: found.append(len(made[0].state)))
    trainer.fit(tmp_path, FACTS, preview(trainer))
    assert found[0] == len(list(trainer.module.parameters()))


def test_no_memory_in_the_first_update_is_a_clear_line_and_loses_nothing(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = new_trainer(base)
    expected = unbroken.fit(tmp_path / "unbroken", FACTS, preview(unbroken)).history

    def no_memory(self: torch.optim.AdamW) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", no_memory)
        broken = new_trainer(base)
        with pytest.raises(TrainingError, match=r"Step 0: no memory for the optimiser's update.*starts at step 0"):
            broken.fit(tmp_path / "broken", FACTS, preview(broken))
    resumed = new_trainer(base)
    assert resumed.fit(tmp_path / "broken", FACTS, preview(resumed)).history == expected
