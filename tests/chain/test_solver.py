"""Any deterministic scheduler of diffusers as a pure function: same bits as its own loop, in whatever order it is called."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from textcraftor.chain.solver import OVERRIDES, SCHEDULERS, Solver
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
# Scheduler -> length of its history before steps 0 to 5 of six: what its order needs, and no more.
HISTORY = {
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


def make_solver(name: str, steps: int = 6, **base: Any) -> Solver:
    return Solver(ChainConfig(scheduler=name, num_inference_steps=steps), BASE | base, torch.device("cpu"))


def diffusers_scheduler(name: str, steps: int = 6) -> Any:
    scheduler = getattr(diffusers, SCHEDULERS.get(name, name)).from_config(
        {**BASE, "set_alpha_to_one": False, "clip_sample": False} | OVERRIDES.get(name, {})
    )
    scheduler.set_timesteps(steps)
    return scheduler


def unet(latents: Tensor, timestep: Tensor) -> Tensor:
    """A stand-in: nonlinear and dependent on the timestep, so that no two calls are alike."""
    return torch.tanh(0.7 * latents) + 0.1 * torch.sin(3 * latents + timestep / 100)


def noise(sigma: Any) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigma


def finish(solver: Solver, latents: Tensor, history: tuple[Tensor, ...], first: int) -> Tensor:
    for step_index in range(first, 6):
        for call in solver.unet_calls(step_index):
            prediction = unet(solver.scale(latents, call), solver.timesteps[call])
            latents, history = solver.step(prediction, call, latents, history)
    return latents


@pytest.mark.parametrize("name", HISTORY)
def test_same_bits_as_diffusers_own_loop(name: str) -> None:
    scheduler, solver = diffusers_scheduler(name), make_solver(name)
    latents = noise(scheduler.init_noise_sigma)
    ours = finish(solver, latents, (), 0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(unet(scheduler.scale_model_input(latents, timestep), timestep), timestep, latents).prev_sample
    assert torch.equal(ours, latents)
    assert torch.equal(finish(solver, noise(scheduler.init_noise_sigma), (), 0), ours), (
        "a second chain does not depend on the first"
    )


@pytest.mark.parametrize("name", HISTORY)
def test_latents_and_history_suffice_to_continue_from_any_step(name: str) -> None:
    solver = make_solver(name)
    latents, history = noise(solver.init_noise_sigma), ()
    expected_end = finish(solver, latents, (), 0)
    for step_index in range(6):
        packed = solver.pack(latents, history)
        assert packed.shape[1] == 4 * (1 + HISTORY[name][step_index])
        restored = make_solver(name)
        assert torch.equal(finish(restored, *restored.unpack(packed, step_index), step_index), expected_end), step_index
        for call in solver.unet_calls(step_index):
            latents, history = solver.step(unet(solver.scale(latents, call), solver.timesteps[call]), call, latents, history)


@pytest.mark.parametrize("name", [name for name in HISTORY if name != "UniPCMultistepScheduler"])  # it multiplies some by 0
def test_every_tensor_of_the_history_affects_the_result(name: str) -> None:
    solver = make_solver(name)
    latents, history = noise(solver.init_noise_sigma), ()
    for step_index in range(6):
        expected_end = finish(solver, latents, history, step_index)
        for number, tensor in enumerate(history):
            disturbed = (*history[:number], tensor + 1, *history[number + 1 :])
            assert not torch.equal(finish(solver, latents, disturbed, step_index), expected_end), (step_index, number)
        for call in solver.unet_calls(step_index):
            latents, history = solver.step(unet(solver.scale(latents, call), solver.timesteps[call]), call, latents, history)


@pytest.mark.parametrize("name", HISTORY)
def test_the_chain_is_differentiable(name: str) -> None:
    solver = make_solver(name)
    start = noise(solver.init_noise_sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(finish(solver, start, (), 0).sum(), start)
    assert gradient.isfinite().all() and (gradient != 0).all()


def test_unet_calls_of_second_order_solvers() -> None:
    assert [list(make_solver("HeunDiscreteScheduler", 3).unet_calls(step)) for step in range(3)] == [[0, 1], [2, 3], [4]]
    assert [list(make_solver("pndm", 3).unet_calls(step)) for step in range(3)] == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("name", "message"),
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
def test_unusable_schedulers_raise_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_solver(name)


def test_detecting_drawn_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="draws noise"):
        make_solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    assert torch.equal(torch.get_rng_state(), before)


def test_more_steps_than_the_base_has_raise_config_error() -> None:
    with pytest.raises(ConfigError, match="num_inference_steps = 1001 is more than the base's 1000"):
        make_solver("ddim", 1001)


def test_the_scheduler_object_never_changes() -> None:
    solver = make_solver("UniPCMultistepScheduler")
    before = copy.deepcopy(vars(solver._scheduler))
    finish(solver, noise(solver.init_noise_sigma), (), 0)
    after = vars(solver._scheduler)
    assert all(str(after[name]) == str(value) for name, value in before.items())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver"])
def test_predict_original_agrees_with_diffusers(name: str, prediction_type: str) -> None:
    ours = make_solver(name, prediction_type=prediction_type)
    latents, noise_pred = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = ours._scheduler_before(4, latents, (latents,) * ours.history_length(4))
    if name == "dpmsolver":  # dpmsolver++ works on this prediction
        expected = scheduler.convert_model_output(noise_pred, sample=latents)
    else:
        expected = scheduler.step(noise_pred, ours.timesteps[4], latents).pred_original_sample
    torch.testing.assert_close(ours.predict_original(noise_pred, 4, latents), expected, atol=1e-4, rtol=1e-4)
