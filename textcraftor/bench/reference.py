"""A plain training step with the semantics of the published code, to measure ours against: 40 UNet forwards.

Nothing is cached: every step computes the whole chain, the prompts' text features and both embeddings. The steps that
carry gradient are checkpointed. UNet, VAE and rewards keep `requires_grad`, so weight gradients are computed for them,
which nobody reads or zeroes. It shares no code with `Sampler` or `Objective`. Where the published code's loss differs
from ours (preprocessing, clamp; `docs/decisions/published-code.md`) it takes ours, so that the gradients are comparable.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textcraftor.config import ChainConfig
from textcraftor.rewards import Reward


class ReferenceLoop:
    """The published training step.

    pipe: a Stable Diffusion pipeline.  encoder: the copy of its text encoder that is tuned.
    """

    def __init__(
        self,
        pipe: Any,
        encoder: Any,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        chain: ChainConfig,
        grad_steps: int,
    ) -> None:
        self.pipe, self.encoder, self.rewards, self.weights = pipe, encoder, rewards, weights
        self.guidance_scale, self.grad_steps = chain.guidance_scale, grad_steps
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.scheduler.set_timesteps(chain.num_inference_steps, device=pipe.unet.device)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that keep `requires_grad` although their gradients are not used."""
        return [self.pipe.unet, self.pipe.vae, *self.rewards.values()]

    def step(self, prompts: Sequence[str], noise: Tensor) -> None:
        """Compute the gradient of the loss: in the encoder, and unused in every other module."""
        timesteps = self.scheduler.timesteps
        with torch.no_grad():
            frozen_embeds = self._embed(self.pipe.text_encoder, prompts)
        embeds = self._embed(self.encoder, prompts)
        latents = noise
        for index, timestep in enumerate(timesteps):
            if index < len(timesteps) - self.grad_steps:
                with torch.no_grad():
                    latents = self._denoise(latents, timestep, frozen_embeds)
            else:
                latents = checkpoint(self._denoise, latents, timestep, embeds, use_reentrant=False)
        images = self.pipe.vae.decode((latents / self.pipe.vae.config.scaling_factor).to(self.pipe.vae.dtype)).sample
        images = images.float() / 2 + 0.5
        images = images + (images.clamp(0, 1) - images).detach()  # saturated pixels pass their gradient
        total = torch.zeros(len(prompts), device=images.device)
        for name, weight in self.weights.items():
            reward = self.rewards[name]
            total = total + weight * reward.score(images, reward.text_features(list(prompts)))
        (-total.mean()).backward()

    def _embed(self, encoder: Any, prompts: Sequence[str]) -> Tensor:
        tokens = self.pipe.tokenizer(
            ["", *prompts],
            padding="max_length",
            max_length=self.pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        embeds = encoder(tokens.input_ids.to(self.pipe.unet.device))[0]
        return torch.cat([embeds[:1].expand_as(embeds[1:]), embeds[1:]]).to(self.pipe.unet.dtype)

    def _denoise(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        pair = torch.cat([latents, latents]).to(self.pipe.unet.dtype)
        predicted = self.pipe.unet(pair, timestep, encoder_hidden_states=embeds).sample.to(latents.dtype)
        uncond, cond = predicted.chunk(2)
        return self.scheduler.step(uncond + self.guidance_scale * (cond - uncond), timestep, latents).prev_sample
