"""The loss of a micro batch and its gradient, in variants that differ in which denoising steps carry gradient.

Loss = -sum weight * reward. The backward pass is split at the prompt embeddings and at z_0, so that the encoder runs
once and images are decoded and scored in slices; `batch_size`, `decode_size` and `gradient` bound the memory. The split
does not change the gradient, not even its bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textcraftor.chain.sampler import Sampler
from textcraftor.config import TrainConfig, TuneConfig
from textcraftor.distributed.fsdp import is_sharded
from textcraftor.errors import TrainingError
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.conditioning import Conditioning
from textcraftor.rewards import RewardMix
from textcraftor.training.data import Batch


@dataclass(frozen=True)
class Objective:
    """The loss and its gradient through the denoising chain."""

    base: Base
    sampler: Sampler
    mix: RewardMix
    tune: TuneConfig

    @property
    def unet_is_sharded(self) -> bool:
        """Whether the UNet is sharded over the ranks, so that every rank must run it equally often, even after an error."""
        return is_sharded(self.base.pipe.unet)

    def backward(self, batch: Batch, tuned: TunedModel, step: int, share: float = 1.0) -> dict[str, float]:
        """Add the gradient of `share` * loss, averaged over the batch, to the trained parameters of `tuned`.

        step: training step. Random choices of a variant depend on it and the seed only, so that accumulation, a resumed
        run and other ranks make the same.  Returns the loss and the mean of each reward.
        Raises TrainingError naming a reward that is not finite, before any gradient is added. With a sharded UNet it
        does not: the returned values and the gradient are then not finite.
        """
        conditioning = self.base.conditioning(batch.prompts, tuned)
        leaves = conditioning.detach()
        if self.tune.gradient == "stop_gradient":
            values = self._stop_gradient_backward(leaves, tuned, batch, step, share)
        else:
            latents = self._denoise(leaves, tuned, batch, step)
            cotangent, values = self._score(latents, batch, share)
            latents.backward(cotangent)
        if isinstance(self.tune, TrainConfig) and self.tune.max_prompt_grad_norm is not None:
            leaves.clip_gradients(self.tune.max_prompt_grad_norm * share / len(batch.prompts))  # the loss is a mean
        conditioning.backward(leaves)
        return values

    def find_nonfinite_rewards(self, batch: Batch, tuned: TunedModel) -> list[str]:
        """Names of the rewards that are not finite, or whose gradient with respect to the images is not; for a message."""
        with torch.no_grad():
            conditioning = self.base.conditioning(batch.prompts, tuned)
            latents = self.sampler.finish(batch.latents, conditioning, tuned.unet)
            images = self.sampler.decode(latents)
        nonfinite = []
        for name, reward in self.mix.rewards.items():
            leaf = images.detach().requires_grad_(True)
            total = reward.score_rows(leaf, batch.text_features[name], batch.rows).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
            if not (torch.isfinite(total) and torch.isfinite(gradient).all()):
                nonfinite.append(name)
        return nonfinite

    def _denoise(self, conditioning: Conditioning, tuned: TunedModel, batch: Batch, step: int) -> Tensor:
        """z_0, or its prediction (`one_step`), with the autograd graph of the steps that carry gradient."""
        tune, sampler = self.tune, self.sampler
        if tune.gradient == "one_step":
            at = sampler.num_inference_steps - tune.grad_steps + self._random(step).integers(tune.grad_steps)
            return sampler.predict_original(batch.latents, conditioning, int(at), tuned.unet)
        grad_steps = tune.grad_steps
        if tune.gradient == "random":
            grad_steps = int(self._random(step).integers(1, tune.grad_steps, endpoint=True))
        return sampler.finish(batch.latents, conditioning, tuned.unet, grad_steps, tune.gradient_checkpointing)

    def _stop_gradient_backward(
        self, conditioning: Conditioning, tuned: TunedModel, batch: Batch, step: int, share: float
    ) -> dict[str, float]:
        """DRTune (arXiv 2405.00760): the UNet's latent input is detached, so dL/dz flows through the solver alone, and the
        UNet graph of each chosen step is built, used and freed on its own."""
        sampler, solver, unet = self.sampler, self.sampler.solver, tuned.unet or self.base.pipe.unet
        chosen = {call for at in self.chosen_steps(step) for call in solver.unet_calls(at)}
        state = solver.unpack(batch.latents.to(self.base.device, sampler.latents_dtype), sampler.switch_step)
        passed = []
        with torch.no_grad():
            for step_index in range(sampler.switch_step, sampler.num_inference_steps):
                for call in solver.unet_calls(step_index):
                    noise_pred = sampler.predict_noise(state[0], conditioning, call, unet)
                    passed.append((call, state, noise_pred))
                    state = solver.step(noise_pred, call, *state)
        last, values = self._score(state[0], batch, share)
        cotangents = [last, *(torch.zeros_like(last) for _ in state[1])]
        for call, (latents, history), noise_pred in reversed(passed):
            if call < min(chosen):
                break
            if call in chosen:
                noise_pred = sampler.predict_noise(latents, conditioning, call, unet)
            leaves = [tensor.detach().requires_grad_(True) for tensor in (latents, *history)]
            after, history_after = solver.step(noise_pred, call, leaves[0], tuple(leaves[1:]))
            outputs = [(t, g) for t, g in zip((after, *history_after), cotangents, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in outputs], [g for _, g in outputs])
            cotangents = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return values

    def chosen_steps(self, step: int) -> set[int]:
        """`stop_gradient`: K step indices spread evenly over the tuned part of the chain, with a random offset."""
        first, tune = self.sampler.switch_step, self.tune
        stride = (self.sampler.num_inference_steps - first) / tune.grad_steps
        offset = self._random(step).random()
        return {first + int((k + offset) * stride) for k in range(tune.grad_steps)}

    def _score(self, latents: Tensor, batch: Batch, share: float) -> tuple[Tensor, dict[str, float]]:
        """(d(share * loss)/dz_0, means of loss and rewards). Decodes and scores `decode_size` images at a time."""
        leaf = latents.detach().requires_grad_(True)
        size, totals = len(leaf), dict[str, float]()
        for start in range(0, size, self.tune.decode_size or size):
            stop = min(size, start + (self.tune.decode_size or size))
            part, fraction = batch.part(start, stop), (stop - start) / size
            images = self.sampler.decode(leaf[start:stop])
            gradient, total, rewards = self._score_images(images.detach(), part, fraction * share)
            images.backward(gradient)
            for name, value in {"loss": -total.mean(), **{n: v.mean() for n, v in rewards.items()}}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * fraction
        assert leaf.grad is not None
        return leaf.grad, totals

    def _score_images(self, images: Tensor, batch: Batch, share: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(d(share * loss)/d images, total, rewards). Only one reward's graph is in memory at a time.

        Rewards run in reverse order, as autograd does in a graph of all of them: the gradient is the same bit for bit.
        """
        leaf, rewards = images.requires_grad_(True), dict[str, Tensor]()
        for name in reversed(self.mix.weights):
            value = self.mix.score(name, leaf, batch.text_features, batch.rows)
            if not self.unet_is_sharded:
                _require_finite(name, value, batch.prompts)
            if not value.requires_grad:
                raise TrainingError(
                    f"Reward {name} sends no gradient to the images, so nothing can be trained by it. Score them "
                    "differentiably, or leave it out of the mix and make it a judge"
                )
            (-(self.mix.weights[name] * value).mean() * share).backward()
            rewards[name] = value.detach()
        rewards = {name: rewards[name] for name in self.mix.weights}
        assert leaf.grad is not None
        return leaf.grad, self.mix.total(rewards), rewards

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.tune.seed, step])


def _require_finite(name: str, values: Tensor, prompts: list[str]) -> None:
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"Reward {name} is not finite for a prompt among {prompts[:3]}...; "
            "nothing was updated. Lower the learning rate, or leave the reward out of the mix"
        )
