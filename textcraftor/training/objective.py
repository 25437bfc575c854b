"""The loss of a micro batch and its gradient, by the variants of which denoising steps carry it.

Loss = -sum weight * reward; the sign is turned here, once. The backward pass is cut at two places, the prompt
embeddings and z_0: the encoder runs once whatever lies behind it, images are decoded and scored in slices, and what
is chosen (`batch_size`, `decode_size`, `gradient`) bounds the memory. A cut changes no gradient, not even its bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textcraftor.chain.sampler import Sampler
from textcraftor.config import TuneConfig
from textcraftor.distributed.fsdp import is_sharded
from textcraftor.errors import TrainingError
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.conditioning import Conditioning
from textcraftor.rewards import RewardMix
from textcraftor.training.data import Batch


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how its gradient travels back through the chain."""

    base: Base
    sampler: Sampler
    mix: RewardMix
    tune: TuneConfig

    @property
    def unet_is_sharded(self) -> bool:
        """Whether the UNet is split over the processes, so that all must run it equally often, whatever they find."""
        return is_sharded(self.base.pipe.unet)

    def backward(self, batch: Batch, tuned: TunedModel, step: int, share: float = 1.0) -> dict[str, float]:
        """Add the gradient of `share` * loss, mean over the batch, to whatever of `tuned` is trained.

        step: of training; what a variant draws depends on it and the seed alone, so that accumulation, a resumed run
        and other processes draw the same.  Returns the loss and each reward's mean.
        Raises TrainingError naming the reward that is not finite, before any gradient is added. Not of processes in
        step: there a reward that is not finite shows in what is returned, and in the gradient.
        """
        conditioning = self.base.conditioning(batch.prompts, tuned)
        leaves = conditioning.detach()
        if self.tune.gradient == "stop_gradient":
            values = self._streamed(leaves, tuned, batch, step, share)
        else:
            latents = self._graph(leaves, tuned, batch, step)
            cotangent, values = self._score(latents, batch, share)
            latents.backward(cotangent)
        conditioning.backward(leaves)
        return values

    def find_nonfinite_rewards(self, batch: Batch, tuned: TunedModel) -> list[str]:
        """The rewards that are not finite, or whose gradient to the image isn't, for a message; none when it is the chain's."""
        with torch.no_grad():
            conditioning = self.base.conditioning(batch.prompts, tuned)
            latents = self.sampler.finish(batch.latents, conditioning, tuned.unet)
            images = self.sampler.decode(latents)
        broken = []
        for name, reward in self.mix.rewards.items():
            leaf = images.detach().requires_grad_(True)
            total = reward.score_rows(leaf, batch.text_features[name], batch.rows).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
            if not (torch.isfinite(total) and torch.isfinite(gradient).all()):
                broken.append(name)
        return broken

    def _graph(self, conditioning: Conditioning, tuned: TunedModel, batch: Batch, step: int) -> Tensor:
        """z_0, or the prediction of it, with the graph of the steps that carry gradient."""
        tune, sampler = self.tune, self.sampler
        if tune.gradient == "one_step":
            at = sampler.num_inference_steps - tune.grad_steps + self._draw(step).integers(tune.grad_steps)
            return sampler.predict_original(batch.latents, conditioning, int(at), tuned.unet)
        grad_steps = tune.grad_steps
        if tune.gradient == "random":
            grad_steps = int(self._draw(step).integers(1, tune.grad_steps, endpoint=True))
        return sampler.finish(batch.latents, conditioning, tuned.unet, grad_steps, tune.gradient_checkpointing)

    def _streamed(
        self, conditioning: Conditioning, tuned: TunedModel, batch: Batch, step: int, share: float
    ) -> dict[str, float]:
        """DRTune (arXiv 2405.00760): with the UNet's latent input detached, dL/dz travels back through the solver alone,
        and each chosen step's UNet graph is built, used and freed on its own."""
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
        """`stop_gradient`: K step indices spread evenly over the tuned part, the offset drawn for each step."""
        first, tune = self.sampler.switch_step, self.tune
        stride = (self.sampler.num_inference_steps - first) / tune.grad_steps
        offset = self._draw(step).random()
        return {first + int((k + offset) * stride) for k in range(tune.grad_steps)}

    def _score(self, latents: Tensor, batch: Batch, share: float) -> tuple[Tensor, dict[str, float]]:
        """(d(share * loss)/dz_0, the means of loss and rewards), a slice of images at a time."""
        leaf = latents.detach().requires_grad_(True)
        size, totals = len(leaf), dict[str, float]()
        for start in range(0, size, self.tune.decode_size or size):
            stop = min(size, start + (self.tune.decode_size or size))
            few, part = batch.part(start, stop), (stop - start) / size
            images = self.sampler.decode(leaf[start:stop])
            gradient, total, rewards = self._judge(images.detach(), few, part * share)
            images.backward(gradient)
            for name, value in {"loss": -total.mean(), **{n: v.mean() for n, v in rewards.items()}}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * part
        assert leaf.grad is not None
        return leaf.grad, totals

    def _judge(self, images: Tensor, batch: Batch, share: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(d(share * loss)/d images, the total, each reward): one reward's graph in memory at a time.

        The last reward goes first, as it does in a graph of them all: the same gradient, bit for bit.
        """
        leaf, rewards = images.requires_grad_(True), dict[str, Tensor]()
        for name in reversed(self.mix.weights):
            value = self.mix.score(name, leaf, batch.text_features, batch.rows)
            if not self.unet_is_sharded:
                _refuse_nonfinite(name, value, batch.prompts)
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

    def _draw(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.tune.seed, step])


def _refuse_nonfinite(name: str, values: Tensor, prompts: list[str]) -> None:
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"Reward {name} is not finite for a prompt among {prompts[:3]}...; "
            "nothing was updated. Lower the learning rate, or leave the reward out of the mix"
        )
