"""The chain: the switch between the encoders, the steps that carry gradient, and the gradient itself."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tests.fixtures import CHAIN
from textcraftor.chain.sampler import Sampler
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.conditioning import Conditioning

PROMPTS = ["a small red circle", "a large blue square on a black background"]
SEEDS = [3, 4]


@pytest.fixture
def tuned(base: Base) -> TunedModel:
    """A tuned encoder that differs from the base's."""
    encoder = copy.deepcopy(base.text_encoder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TunedModel(encoder.requires_grad_(True))


def diffusers_images(base: Base, encoder: nn.Module, sampler: Sampler) -> torch.Tensor:
    """Images of the unchanged diffusers pipeline with this encoder, from the same noise."""
    pipe = type(base.pipe)(**{**base.pipe.components, "text_encoder": encoder}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=PROMPTS,
        latents=sampler.noise(SEEDS),
        num_inference_steps=CHAIN.num_inference_steps,
        guidance_scale=CHAIN.guidance_scale,
        output_type="pt",
    ).images


def test_switch_at_one_equals_the_frozen_pipeline_bitwise(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 1.0)
    assert torch.equal(sampler.generate(PROMPTS, SEEDS, tuned), diffusers_images(base, base.text_encoder, sampler))


def test_switch_at_zero_equals_the_pipeline_with_the_tuned_encoder_bitwise(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 0.0)
    images = sampler.generate(PROMPTS, SEEDS, tuned)
    assert torch.equal(images, diffusers_images(base, tuned.text_encoder, sampler))
    assert not torch.allclose(images, sampler.generate(PROMPTS, SEEDS), atol=1e-2)


def test_each_switch_gives_different_images(base: Base, tuned: TunedModel) -> None:
    drawn = [Sampler(base, CHAIN, at).generate(PROMPTS, SEEDS, tuned) for at in (0.0, 0.4, 0.8, 1.0)]
    for first, second in itertools.pairwise(drawn):
        assert (first - second).abs().max() > 1e-3


def test_batch_size_and_order_change_rounding_only(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 0.4)
    together = sampler.generate(PROMPTS, SEEDS, tuned)
    alone = torch.cat([sampler.generate([p], [s], tuned) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    swapped = sampler.generate(PROMPTS[::-1], SEEDS[::-1], tuned).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, swapped, atol=1e-4, rtol=0)


def test_cached_prefix_gives_the_same_images(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 0.4)
    prefix = sampler.prefix(PROMPTS, SEEDS)
    assert torch.equal(sampler.generate(PROMPTS, [], tuned, prefix), sampler.generate(PROMPTS, SEEDS, tuned))


@pytest.mark.parametrize("grad_steps", [1, 2, 3])
def test_exactly_the_last_grad_steps_carry_gradient(base: Base, tuned: TunedModel, grad_steps: int) -> None:
    sampler = Sampler(base, CHAIN, 0.4)
    carried: list[bool] = []
    hook = base.pipe.unet.register_forward_hook(lambda *call: carried.append(call[2].sample.requires_grad))
    embeds = base.conditioning(PROMPTS, tuned)
    sampler.finish(sampler.prefix(PROMPTS, SEEDS), embeds, grad_steps=grad_steps)
    hook.remove()
    assert carried == [False] * (CHAIN.num_inference_steps - grad_steps) + [True] * grad_steps


def test_gradient_matches_finite_differences(base: Base, tuned: TunedModel) -> None:
    """In float64, along a random direction of the encoder's weights: through guidance, chain and decoder."""
    for module in (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder, tuned.text_encoder):
        module.double()
    sampler = Sampler(base, CHAIN, 0.6)
    prefix = sampler.prefix(PROMPTS, SEEDS)
    parameters = list(tuned.text_encoder.parameters())
    torch.manual_seed(2)
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def loss() -> torch.Tensor:
        embeds = base.conditioning(PROMPTS, tuned)
        latents = sampler.finish(prefix, embeds, grad_steps=2)
        scaled = latents / base.pipe.vae.config.scaling_factor
        return base.pipe.vae.decode(scaled).sample.square().mean()

    loss().backward()
    analytic = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)

    def loss_at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, delta in zip(parameters, direction, strict=True):
                parameter.add_(step * delta)
            value = loss()
            for parameter, delta in zip(parameters, direction, strict=True):
                parameter.sub_(step * delta)
        return value

    numeric = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=0)


def test_only_the_tuned_encoder_receives_gradient(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 0.8)
    embeds = base.conditioning(PROMPTS, tuned)
    images = sampler.decode(sampler.finish(sampler.prefix(PROMPTS, SEEDS), embeds, grad_steps=1))
    images.mean().backward()
    frozen = (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder)
    assert all(p.grad is None and not p.requires_grad for module in frozen for p in module.parameters())
    assert sum(p.grad.abs().sum() for p in tuned.text_encoder.parameters() if p.grad is not None) > 0


def test_saturated_pixels_pass_their_gradient(base: Base) -> None:
    """Decoded images are clamped to [0, 1] in value alone, so a white or black pixel can still be moved back."""
    sampler = Sampler(base, CHAIN, 0.4)
    latents = (100 * sampler.noise(SEEDS)).requires_grad_()
    unclamped = base.pipe.vae.decode(base.vae_input(latents)).sample / 2 + 0.5
    images = sampler.decode(latents)
    assert torch.equal(images, unclamped.clamp(0, 1))
    saturated = (images == 0) | (images == 1)
    assert saturated.any() and not saturated.all()
    gradient, expected = (
        torch.autograd.grad((image * saturated).sum(), latents, retain_graph=True)[0] for image in (images, unclamped)
    )
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradient, expected)


def test_gradient_checkpointing_changes_no_gradient(base: Base, tuned: TunedModel) -> None:
    sampler = Sampler(base, CHAIN, 0.4)
    prefix = sampler.prefix(PROMPTS, SEEDS)

    def gradient(checkpointing: bool) -> torch.Tensor:
        embeds = base.conditioning(PROMPTS, tuned).prompt_embeds.detach().requires_grad_(True)
        sampler.finish(prefix, Conditioning(embeds), None, 3, checkpointing).square().mean().backward()
        assert embeds.grad is not None
        return embeds.grad

    assert torch.equal(gradient(False), gradient(True))


def test_the_tuned_encoder_embeds_the_empty_prompt_too(base: Base, tuned: TunedModel) -> None:
    """Both halves of guidance are the tuned encoder's (paper section 3.2.2)."""
    ours, frozen = (base.conditioning(PROMPTS, model).prompt_embeds for model in (tuned, None))
    assert torch.equal(ours[0], ours[1]) and not torch.allclose(ours[0], frozen[0], atol=1e-3)
