"""SD 1.x, SD 2.x and SDXL under every scheduler, against the diffusers pipelines' own `__call__`."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import FAMILIES, sdxl
from tests.fixtures import loaded_base, own_base
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BaseConfig, ChainConfig
from textcraftor.control import Control
from textcraftor.errors import ConfigError, ModelError
from textcraftor.models.base import Base, TunedModel, load_base

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue square on a black background"]
SEEDS = [3, 4]
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
Families = Callable[[str], Base]


@pytest.fixture
def family(family_folders: dict[str, Path]) -> Families:
    """Loaded once. Tests leave them as they are; one that does not takes `own_base`."""
    return lambda name: loaded_base(family_folders[name])


def chain(scheduler: str, steps: int = 6) -> ChainConfig:
    return ChainConfig.model_validate({"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": 3.0})


def tuned_model(base: Base, *names: str) -> TunedModel:
    """Encoders that differ from the base's, ready for gradient."""
    torch.manual_seed(5)
    encoders = {name: copy.deepcopy(base.encoders[name]) for name in names or base.encoders}
    for encoder in encoders.values():
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        encoder.requires_grad_(True)
    return TunedModel(**encoders)


def stock_images(base: Base, settings: ChainConfig, noise: Tensor, tuned: TunedModel | None = None, at: float = 0.0) -> Tensor:
    """The untouched pipeline's own call, controlled by a tuned model from the switch on where there is one."""
    name, options = STOCK.get(settings.scheduler, (settings.scheduler, {}))
    pipe = copy.copy(base.pipe)
    pipe.scheduler = getattr(diffusers, name).from_config(base.pipe.scheduler.config, **options)
    pipe.scheduler.set_timesteps(settings.num_inference_steps)
    words = Control({"tuned": tuned}, switch_at=at)(pipe, PROMPTS) if tuned else {"prompt": PROMPTS}
    return pipe(
        **words,
        height=32,
        width=32,
        latents=noise / pipe.scheduler.init_noise_sigma,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        output_type="pt",
    ).images


@pytest.mark.parametrize("scheduler", [*STOCK, "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize(("name", "steps"), [("sd1", 6), ("sd1", 25), ("sd2", 6), ("sdxl", 6)])
def test_the_base_draws_what_its_own_pipeline_draws(family: Families, name: str, scheduler: str, steps: int) -> None:
    base = family(name)
    settings = chain(scheduler, steps)
    sampler = Sampler(base, settings, 0.4)
    stock = stock_images(base, settings, sampler.noise(SEEDS))
    torch.testing.assert_close(sampler.generate(PROMPTS, SEEDS), stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", STOCK)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_switch_is_the_stock_pipelines_with_a_callback(family: Families, name: str, scheduler: str) -> None:
    """No cache and one scheduler there; a cached prefix and a solver without memory of its own here."""
    base = family(name)
    tuned, settings = tuned_model(base), chain(scheduler)
    for at in (0.5, 0.17, 0.0):
        sampler = Sampler(base, settings, at)
        stock = stock_images(base, settings, sampler.noise(SEEDS), tuned, at)
        ours = sampler.generate(PROMPTS, SEEDS, tuned)
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
        assert not torch.allclose(ours, sampler.generate(PROMPTS, SEEDS), atol=1e-3)


@pytest.mark.parametrize("scheduler", STOCK)
def test_a_prefix_from_the_disk_gives_the_same_bits(family: Families, scheduler: str, tmp_path: Path) -> None:
    base = family("sd2")
    tuned = tuned_model(base)
    for at in (0.0, 0.17, 0.34, 0.5, 1.0):
        sampler = Sampler(base, chain(scheduler), at)
        prefix = sampler.prefix(PROMPTS, SEEDS)
        assert prefix.shape[1:] == sampler.prefix_shape
        save_file({"latents": prefix}, tmp_path / "prefix.safetensors")
        cached = load_file(tmp_path / "prefix.safetensors")["latents"]
        whole = sampler.generate(PROMPTS, SEEDS, tuned)
        assert torch.equal(sampler.generate(PROMPTS, [], tuned, cached), whole)
        rows = [sampler.generate(PROMPTS[i : i + 1], [], tuned, cached[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(torch.cat(rows), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", STOCK)
def test_where_the_switch_is_does_not_matter_to_the_base(family: Families, scheduler: str) -> None:
    base = family("sd1")
    drawn = [Sampler(base, chain(scheduler), at).generate(PROMPTS, SEEDS) for at in (0.0, 0.17, 0.34, 0.67, 1.0)]
    assert all(torch.equal(images, drawn[0]) for images in drawn)


def test_a_prefix_of_another_solver_is_refused(family: Families) -> None:
    base = family("sd1")
    prefix = Sampler(base, chain("ddim"), 0.5).prefix(PROMPTS, SEEDS)
    with pytest.raises(ModelError, match=r"\(4, 4, 4\).*pndm from step 3 of this base needs \(16, 4, 4\)"):
        Sampler(base, chain("pndm"), 0.5).generate(PROMPTS, [], None, prefix)


@pytest.mark.parametrize("scheduler", STOCK)
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_and_plain_gradients_are_the_same(family: Families, name: str, scheduler: str) -> None:
    base = family(name)
    tuned = tuned_model(base)
    for at, grad_steps in ((0.5, 3), (0.0, 6), (0.5, 1)):
        sampler = Sampler(base, chain(scheduler), at)
        prefix = sampler.prefix(PROMPTS, SEEDS)
        gradients = []
        for checkpointing in (False, True):
            latents = sampler.finish(prefix, base.conditioning(PROMPTS, tuned), None, grad_steps, checkpointing)
            gradients.append(gradient(latents.square().mean(), tuned))
        assert gradients[0].abs().sum() > 0
        assert torch.equal(*gradients)


@pytest.mark.parametrize("scheduler", STOCK)
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_the_gradient_matches_finite_differences(family_folders: dict[str, Path], name: str, scheduler: str) -> None:
    """In float64, along a random direction of all encoders' weights, through every step. Two schedulers compute in
    float32 whatever they get: there the differences are rougher."""
    width, tolerance = (1e-6, 1e-4) if scheduler in ("ddim", "pndm") else (1e-5, 3e-3)
    base = own_base(family_folders[name])
    tuned = tuned_model(base)
    for module in (base.pipe.unet, *base.encoders.values(), *tuned.encoders.values()):
        module.double()
    sampler = Sampler(base, chain(scheduler, 4), 0.0)
    prefix = sampler.prefix(PROMPTS, SEEDS)

    def loss() -> Tensor:
        return sampler.finish(prefix, base.conditioning(PROMPTS, tuned), None, 4).square().mean()

    parameters = [p for encoder in tuned.encoders.values() for p in encoder.parameters()]
    torch.manual_seed(2)
    directions = [torch.randn_like(p) for p in parameters]
    analytic = gradient(loss(), tuned) @ torch.cat([d.flatten() for d in directions])

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            value = loss()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(step * direction)
        return value

    numeric = (moved(width) - moved(-width)) / (2 * width)
    torch.testing.assert_close(analytic, numeric, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 2), ("dpmsolver", 2), ("euler", 2), ("pndm", 2)])
def test_exactly_the_last_steps_carry_gradient(family: Families, scheduler: str, calls: int) -> None:
    base = family("sd1")
    carried: list[bool] = []
    hook = base.pipe.unet.register_forward_hook(lambda *call: carried.append(call[2].sample.requires_grad))
    sampler = Sampler(base, chain(scheduler), 0.0)
    sampler.finish(sampler.noise(SEEDS), base.conditioning(PROMPTS, tuned_model(base)), grad_steps=calls)
    hook.remove()
    assert carried[-calls:] == [True] * calls and not any(carried[:-calls])
    assert len(carried) == 6 + (scheduler == "pndm")


@pytest.mark.parametrize("names", [("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")])
def test_either_or_both_of_sdxls_encoders_are_tuned(family: Families, names: tuple[str, ...]) -> None:
    base = family("sdxl")
    tuned = tuned_model(base, *names)
    sampler = Sampler(base, chain("euler"), 0.5)
    images = sampler.decode(sampler.finish(sampler.prefix(PROMPTS, SEEDS), base.conditioning(PROMPTS, tuned), None, 2))
    images.mean().backward()
    for name in names:
        assert sum(p.grad.abs().sum() for p in tuned.encoders[name].parameters() if p.grad is not None) > 0
    frozen = (base.pipe.unet, base.pipe.vae, *base.encoders.values())
    assert all(p.grad is None for module in frozen for p in module.parameters())
    heard, base_heard = base.conditioning(PROMPTS, tuned), base.conditioning(PROMPTS)
    assert heard.pooled is not None and base_heard.pooled is not None
    assert torch.equal(heard.pooled, base_heard.pooled) == ("text_encoder_2" not in names)
    width = base.pipe.text_encoder.config.hidden_size
    assert torch.equal(heard.prompt_embeds[..., :width], base_heard.prompt_embeds[..., :width]) == ("text_encoder" not in names)


def test_sdxls_empty_prompt_is_what_the_base_says(tmp_path: Path) -> None:
    sdxl(force_zeros=False).save_pretrained(tmp_path / "heard")
    sdxl().save_pretrained(tmp_path / "zeros")
    heard, zeros = (load_base(BaseConfig(path=str(tmp_path / name), resolution=32), CPU) for name in ("heard", "zeros"))
    for base, silent in ((heard, False), (zeros, True)):
        conditioning = base.conditioning(PROMPTS, tuned_model(base))
        assert conditioning.pooled is not None and conditioning.time_ids is not None
        for values in (conditioning.prompt_embeds, conditioning.pooled):
            assert bool((values[:2] == 0).all()) == silent and bool((values[2:] != 0).any())
        assert conditioning.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 4


def test_an_encoder_that_the_base_lacks_is_refused(family: Families) -> None:
    base, other = family("sd1"), family("sdxl")
    with pytest.raises(ConfigError, match=r"Unknown module 'text_encoder_2'\. Known: text_encoder, unet"):
        base.trainable("text_encoder_2")
    with pytest.raises(ModelError, match="has no text_encoder_2; it has text_encoder"):
        base.conditioning(PROMPTS, tuned_model(other, "text_encoder_2"))


@pytest.mark.parametrize("name", FAMILIES)
def test_prediction_type_is_the_bases(family: Families, name: str) -> None:
    base = family(name)
    settings = chain("ddim")
    drawn = Sampler(base, settings, 0.4).generate(PROMPTS, SEEDS)
    other = "epsilon" if name == "sd2" else "v_prediction"
    pipe = copy.copy(base.pipe)
    pipe.scheduler = type(base.pipe.scheduler).from_config(base.pipe.scheduler.config, prediction_type=other)
    wrong = Sampler(dataclasses.replace(base, pipe=pipe), settings, 0.4).generate(PROMPTS, SEEDS)
    assert not torch.allclose(drawn, wrong, atol=1e-2)


def test_more_steps_than_the_base_knows_are_refused(family: Families) -> None:
    with pytest.raises(ConfigError, match=r"chain\.num_inference_steps = 1001 is more than the base's 1000"):
        Sampler(family("sd1"), chain("euler", 1001), 0.4)


def gradient(loss: Tensor, tuned: TunedModel) -> Tensor:
    """The gradient of every tuned parameter, flat; zero where none arrives (a last layer that SDXL skips)."""
    parameters = [p for encoder in tuned.encoders.values() for p in encoder.parameters()]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)])
