"""The gradient of the loss: the split backward pass, which steps carry gradient, and the memory it takes."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from tests.fixtures import Redness
from textcraftor.bench.meters import peak_bytes
from textcraftor.chain.sampler import Sampler
from textcraftor.config import ChainConfig, TrainConfig, TuneConfig
from textcraftor.errors import TrainingError
from textcraftor.models.base import Base, TunedModel
from textcraftor.rewards import RewardMix
from textcraftor.training.data import Batch
from textcraftor.training.objective import Objective

PROMPTS = ["a small red circle", "a large blue square", "a green star on a black background", "two yellow things"]
CHAIN = ChainConfig(num_inference_steps=6, guidance_scale=3.0)


def objective(base: Base, chain: ChainConfig = CHAIN, switch_at: float = 0.5, **tune: Any) -> Objective:
    settings = TuneConfig(**{"grad_steps": 3, "batch_size": 4, "learning_rate": 1e-3, **tune})
    mix = RewardMix({"redness": Redness()}, {"redness": 10.0})
    return Objective(base, Sampler(base, chain, switch_at), mix, settings)


def batch(made: Objective) -> Batch:
    features = {"redness": Redness().text_features(PROMPTS)}
    return Batch(PROMPTS, made.sampler.prefix(PROMPTS, range(4)), features)


@pytest.fixture
def tuned(base: Base) -> TunedModel:
    return TunedModel(copy.deepcopy(base.text_encoder).requires_grad_(True))


def gradient(made: Objective, tuned: TunedModel, step: int = 0) -> torch.Tensor:
    tuned.text_encoder.zero_grad()
    made.backward(batch(made), tuned, step)
    return torch.cat([p.grad.flatten() for p in tuned.text_encoder.parameters() if p.grad is not None])


def carried(made: Objective, tuned: TunedModel, step: int = 0) -> list[bool]:
    """For each UNet call of a step, whether it carries gradient."""
    rows, calls = batch(made), []
    hook = made.base.pipe.unet.register_forward_hook(lambda *call: calls.append(call[2].sample.requires_grad))
    made.backward(rows, tuned, step)
    hook.remove()
    return calls


def test_splitting_the_backward_pass_keeps_the_gradient_bit_for_bit(base: Base, tuned: TunedModel) -> None:
    made = objective(base)
    rows = batch(made)
    latents = made.sampler.finish(rows.latents, base.conditioning(PROMPTS, tuned), None, 3)
    total, _ = made.mix(made.sampler.decode(latents), rows.text_features)
    (-total.mean()).backward()
    direct = torch.cat([p.grad.flatten() for p in tuned.text_encoder.parameters() if p.grad is not None])
    assert torch.equal(direct, gradient(made, tuned))


class Warmth(Redness):
    """Another reward, not linear in the images."""

    def score(self, images: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        return images.square().mean((1, 2, 3)) * text_features[:, 0]


class NoGradient(Redness):
    def score(self, images: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        return super().score(images.detach(), text_features)


def with_rewards(made: Objective, rewards: dict[str, Redness]) -> tuple[Objective, Batch]:
    mix = RewardMix(rewards, {name: 10.0 / (1 + index) for index, name in enumerate(rewards)})
    rows = dataclasses.replace(batch(made), text_features={name: r.text_features(PROMPTS) for name, r in rewards.items()})
    return dataclasses.replace(made, mix=mix), rows


def test_scoring_rewards_one_at_a_time_keeps_the_gradient_bit_for_bit(base: Base, tuned: TunedModel) -> None:
    made, rows = with_rewards(objective(base), {"red": Redness(), "warm": Warmth(), "red again": Redness()})
    latents = made.sampler.finish(rows.latents, base.conditioning(PROMPTS, tuned), None, 3).detach().requires_grad_(True)
    total, parts = made.mix(made.sampler.decode(latents), rows.text_features)
    (-total.mean()).backward()
    ours, values = made._score(latents.detach(), rows, 1.0)
    assert latents.grad is not None and torch.equal(ours, latents.grad)
    assert values == {"loss": float(-total.mean()), **{name: float(value.mean()) for name, value in parts.items()}}


def test_a_reward_without_a_gradient_is_named(base: Base, tuned: TunedModel) -> None:
    made, rows = with_rewards(objective(base), {"red": Redness(), "cut": NoGradient()})
    with pytest.raises(TrainingError, match="Reward cut sends no gradient"):
        made.backward(rows, tuned, 0)


@pytest.mark.parametrize("decode_size", [1, 3])
def test_decoding_in_slices_is_the_same_gradient(base: Base, tuned: TunedModel, decode_size: int) -> None:
    whole, sliced = (gradient(objective(base, decode_size=size), tuned) for size in (None, decode_size))
    assert (whole - sliced).norm() <= 1e-5 * whole.norm()


def test_clipping_bounds_what_each_image_adds(base: Base, tuned: TunedModel) -> None:
    def clipped(max_norm: float, rows: slice = slice(0, 4)) -> torch.Tensor:
        made = objective(base)
        made = dataclasses.replace(made, tune=TrainConfig(**made.tune.model_dump(), max_prompt_grad_norm=max_norm))
        tuned.text_encoder.zero_grad()
        made.backward(batch(made).part(rows.start, rows.stop), tuned, 0)
        return torch.cat([p.grad.flatten() for p in tuned.text_encoder.parameters() if p.grad is not None])

    plain = gradient(objective(base), tuned)
    assert torch.equal(clipped(1e6), plain)
    small = clipped(1e-3)
    one_by_one = torch.stack([clipped(1e-3, slice(n, n + 1)) for n in range(4)]).mean(0)
    assert (small - one_by_one).norm() <= 1e-4 * small.norm() < 1e-4 * plain.norm()
    assert (clipped(2e-3) - 2 * small).norm() <= 1e-4 * small.norm()  # all four are clipped


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver", "pndm", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("grad_steps", [1, 3])
def test_stop_gradient_step_by_step_equals_one_autograd_graph(
    base: Base, tuned: TunedModel, scheduler: str, grad_steps: int
) -> None:
    made = objective(base, CHAIN.model_copy(update={"scheduler": scheduler}), gradient="stop_gradient", grad_steps=grad_steps)
    sampler, rows = made.sampler, batch(made)
    chosen = made.chosen_steps(0)
    assert len(chosen) == grad_steps and all(3 <= at < 6 for at in chosen)
    conditioning = base.conditioning(PROMPTS, tuned)
    latents, history = sampler.solver.unpack(rows.latents, sampler.switch_step)
    for step_index in range(sampler.switch_step, 6):
        for call in sampler.solver.unet_calls(step_index):
            with torch.set_grad_enabled(step_index in chosen):
                noise_pred = sampler.predict_noise(latents.detach(), conditioning, call, base.pipe.unet)
            latents, history = sampler.solver.step(noise_pred, call, latents, history)
    total, _ = made.mix(sampler.decode(latents), rows.text_features)
    (-total.mean()).backward()
    at_once = torch.cat([p.grad.flatten() for p in tuned.text_encoder.parameters() if p.grad is not None])
    streamed = gradient(made, tuned)
    assert at_once.norm() > 0 and (at_once - streamed).norm() <= 1e-5 * at_once.norm()


def test_stop_gradient_memory_does_not_grow_with_grad_steps(base: Base, tuned: TunedModel) -> None:
    def peak(variant: str, grad_steps: int) -> int:
        made = objective(base, switch_at=0.0, gradient=variant, grad_steps=grad_steps)
        rows = batch(made)
        made.backward(rows, tuned, 0)  # the encoder's gradients are there before we measure
        return peak_bytes(lambda: made.backward(rows, tuned, 0), base.device)

    assert peak("stop_gradient", 6) <= 1.1 * peak("stop_gradient", 1)
    assert peak("truncated", 6) >= 1.5 * peak("truncated", 1)


def test_one_step_predicts_the_image_from_one_late_step(base: Base, tuned: TunedModel) -> None:
    made = objective(base, gradient="one_step")
    drawn = [carried(made, tuned, step) for step in range(12)]
    assert all(calls == [False] * (len(calls) - 1) + [True] for calls in drawn), "nothing runs after it"
    assert {len(calls) for calls in drawn} == {1, 2, 3}, "each of the last three steps is drawn"


@pytest.mark.parametrize(
    "scheduler", ["ddim", "dpmsolver", "euler", "pndm", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_the_last_prediction_is_the_image(base: Base, scheduler: str) -> None:
    """Hardly any noise is left at the end of the chain, so the prediction there is close to z_0."""
    sampler = Sampler(base, CHAIN.model_copy(update={"scheduler": scheduler, "num_inference_steps": 20}), 0.5)
    prefix, conditioning = sampler.prefix(PROMPTS, range(4)), base.conditioning(PROMPTS)
    with torch.no_grad():
        latents = sampler.finish(prefix, conditioning)
        predicted = sampler.predict_original(prefix, conditioning, 19)
    assert (predicted - latents).norm() <= 0.1 * latents.norm()


def test_random_draws_how_many_steps_carry_gradient(base: Base, tuned: TunedModel) -> None:
    made = objective(base, gradient="random")
    counts = [sum(carried(made, tuned, step)) for step in range(12)]
    assert set(counts) == {1, 2, 3}
    assert counts == [sum(carried(made, tuned, step)) for step in range(12)], "depends on seed and step only"


@pytest.mark.parametrize("variant", ["truncated", "random", "one_step", "stop_gradient"])
def test_every_variant_raises_the_reward(base: Base, variant: str) -> None:
    made = objective(base, gradient=variant, switch_at=0.0, grad_steps=3)
    tuned = TunedModel(copy.deepcopy(base.text_encoder).requires_grad_(True))
    optimizer = torch.optim.AdamW(tuned.text_encoder.parameters(), lr=1e-2)
    rows = batch(made)
    before = score(made, rows, tuned)
    for step in range(12):
        optimizer.zero_grad()
        made.backward(rows, tuned, step)
        optimizer.step()
    assert score(made, rows, tuned) > before + 1e-4


def score(made: Objective, rows: Batch, tuned: TunedModel) -> float:
    with torch.no_grad():
        images = made.sampler.decode(made.sampler.finish(rows.latents, made.base.conditioning(PROMPTS, tuned)))
        return float(made.mix(images, rows.text_features)[1]["redness"].mean())


def test_a_nonfinite_gradient_is_traced_to_its_reward(base: Base, tuned: TunedModel) -> None:
    class Steep(Redness):
        def score(self, images: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
            return (images.mean((1, 2, 3)) * 0).sqrt()  # finite, but its gradient is not

    made = objective(base)
    mix = RewardMix({"redness": Redness(), "steep": Steep("steep")}, {"redness": 1.0, "steep": 1.0})
    made = dataclasses.replace(made, mix=mix)
    rows = batch(objective(base))
    rows = dataclasses.replace(rows, text_features={**rows.text_features, "steep": rows.text_features["redness"]})
    assert made.find_nonfinite_rewards(rows, tuned) == ["steep"]


def test_a_reward_that_is_not_finite_adds_no_gradient(base: Base, tuned: TunedModel) -> None:
    made = objective(base)
    made.mix.rewards["redness"].scale.fill_(float("inf"))
    with pytest.raises(TrainingError, match="redness is not finite"):
        made.backward(batch(made), tuned, 0)
    assert all(p.grad is None for p in tuned.text_encoder.parameters())
