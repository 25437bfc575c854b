"""Any scheduler of diffusers that draws no noise, as a function: the same bits as its own loop, however it is called."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from textcraftor.chain.solver import FORCED, SCHEDULERS, Solver
from textcraftor.config import ChainConfig
from textcraftor.errors import ConfigError

BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
# Scheduler -> tensors remembered before steps 0 to 5 of six: what its order of multistep needs, and no more.
MEMORY = {
    "ddim": [0, 0, 0, 0, 0, 0],
    "euler": [0, 0, 0, 0, 0, 0],
    "dpmsolver": [0, 1, 1, 1, 1, 0],
    "pndm": [0, 1, 2, 3, 3, 3],
    "DEISMultistepScheduler": [0, 1, 1, 1, 1, 0],
    "DPMSolverSinglestepScheduler": [0, 2, 0, 2, 0, 0],
    "HeunDiscreteScheduler": [0, 0, 0, 0, 0, 0],
    "KDPM2DiscreteScheduler": [0, 0, 0, 0, 0, 0],
    "LMSDiscreteScheduler": [0, 1, 2, 3, 3, 3],
    "UniPCMultistepScheduler": [0, 2, 3, 3, 3, 3],
}


def solver(name: str, steps: int = 6, **base: Any) -> Solver:
    return Solver(ChainConfig(scheduler=name, num_inference_steps=steps), BASE | base, torch.device("cpu"))


def stock(name: str, steps: int = 6) -> Any:
    scheduler = getattr(diffusers, SCHEDULERS.get(name, name)).from_config(
        {**BASE, "set_alpha_to_one": False, "clip_sample": False} | FORCED.get(name, {})
    )
    scheduler.set_timesteps(steps)
    return scheduler


def unet(latents: Tensor, timestep: Tensor) -> Tensor:
    """Not linear, and of the timestep, so that no two calls are alike."""
    return torch.tanh(0.7 * latents) + 0.1 * torch.sin(3 * latents + timestep / 100)


def noise(sigma: Any) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigma


def finish(made: Solver, latents: Tensor, memory: tuple[Tensor, ...], first: int) -> Tensor:
    for step_index in range(first, 6):
        for place in made.evaluations(step_index):
            prediction = unet(made.scale(latents, place), made.timesteps[place])
            latents, memory = made.step(prediction, place, latents, memory)
    return latents


@pytest.mark.parametrize("name", MEMORY)
def test_its_own_loop_gives_the_same_bits(name: str) -> None:
    scheduler, made = stock(name), solver(name)
    latents = noise(scheduler.init_noise_sigma)
    ours = finish(made, latents, (), 0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(unet(scheduler.scale_model_input(latents, timestep), timestep), timestep, latents).prev_sample
    assert torch.equal(ours, latents)
    assert torch.equal(finish(made, noise(scheduler.init_noise_sigma), (), 0), ours), "a second chain knows of no first"


@pytest.mark.parametrize("name", MEMORY)
def test_the_state_at_any_step_is_all_that_the_rest_needs(name: str) -> None:
    made = solver(name)
    latents, memory = noise(made.init_noise_sigma), ()
    whole = finish(made, latents, (), 0)
    for step_index in range(6):
        packed = made.pack(latents, memory)
        assert packed.shape[1] == 4 * (1 + MEMORY[name][step_index])
        restored = solver(name)
        assert torch.equal(finish(restored, *restored.unpack(packed, step_index), step_index), whole), step_index
        for place in made.evaluations(step_index):
            latents, memory = made.step(unet(made.scale(latents, place), made.timesteps[place]), place, latents, memory)


@pytest.mark.parametrize("name", [name for name in MEMORY if name != "UniPCMultistepScheduler"])  # it multiplies some by 0
def test_every_tensor_of_the_memory_is_needed(name: str) -> None:
    made = solver(name)
    latents, memory = noise(made.init_noise_sigma), ()
    for step_index in range(6):
        whole = finish(made, latents, memory, step_index)
        for number, tensor in enumerate(memory):
            disturbed = (*memory[:number], tensor + 1, *memory[number + 1 :])
            assert not torch.equal(finish(made, latents, disturbed, step_index), whole), (step_index, number)
        for place in made.evaluations(step_index):
            latents, memory = made.step(unet(made.scale(latents, place), made.timesteps[place]), place, latents, memory)


@pytest.mark.parametrize("name", MEMORY)
def test_a_chain_is_differentiable(name: str) -> None:
    made = solver(name)
    start = noise(made.init_noise_sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(finish(made, start, (), 0).sum(), start)
    assert gradient.isfinite().all() and (gradient != 0).all()


def test_the_second_order_takes_two_calls_a_step_and_ends_with_one() -> None:
    assert [list(solver("HeunDiscreteScheduler", 3).evaluations(step)) for step in range(3)] == [[0, 1], [2, 3], [4]]
    assert [list(solver("pndm", 3).evaluations(step)) for step in range(3)] == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EulerAncestralDiscreteScheduler", "draws noise"),
        ("DDPMScheduler", "draws noise"),
        ("LCMScheduler", "draws noise"),
        ("IPNDMScheduler", "noise schedule of its own"),
        ("EDMEulerScheduler", "noise schedule of its own"),
        ("FlowMatchEulerDiscreteScheduler", "noise schedule of its own|does not fit"),
        ("DDIMInverseScheduler", "from the image to the noise"),
        ("KarrasVeScheduler", "noise schedule of its own|does not fit"),
        ("NoSuchScheduler", "diffusers has no such scheduler"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solver(name)


def test_drawing_noise_is_found_without_moving_anybodys_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="draws noise"):
        solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    assert torch.equal(torch.get_rng_state(), before)


def test_more_steps_than_the_base_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_inference_steps = 1001 is more than the base's 1000"):
        solver("ddim", 1001)


def test_the_scheduler_itself_never_moves() -> None:
    made = solver("UniPCMultistepScheduler")
    before = copy.deepcopy(vars(made._scheduler))
    finish(made, noise(made.init_noise_sigma), (), 0)
    after = vars(made._scheduler)
    assert all(str(after[name]) == str(value) for name, value in before.items())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver"])
def test_the_predicted_image_is_the_schedulers_own(name: str, prediction_type: str) -> None:
    ours = solver(name, prediction_type=prediction_type)
    latents, noise_pred = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = ours._at(4, latents, (latents,) * ours.memory_at(4))
    if name == "dpmsolver":  # dpmsolver++ works on this prediction
        expected = scheduler.convert_model_output(noise_pred, sample=latents)
    else:
        expected = scheduler.step(noise_pred, ours.timesteps[4], latents).pred_original_sample
    torch.testing.assert_close(ours.predicted_original(noise_pred, 4, latents), expected, atol=1e-4, rtol=1e-4)
