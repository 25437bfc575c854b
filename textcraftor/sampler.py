"""The differentiable denoising chain: two encoders, one switch, guidance, truncated gradient.

Steps before the switch are conditioned by the frozen encoder E0 (and the frozen UNet), steps from it on by what
is tuned, the empty prompt included. Training switches late and carries gradient through the last steps only;
sampling switches early (paper table 4). The first part depends on nothing that is tuned, so its latents can be
cached and handed back as `prefix`.
"""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textcraftor.config import ChainConfig, switch_step
from textcraftor.models import Base, TunedModel


class Sampler:
    """The chain of one base model, with the switch of one use: training's, or sampling's.

    Stateless between calls; each prompt's noise comes from its own seed, so that batch size, order and sharding
    change results by rounding only.
    """

    def __init__(self, base: Base, chain: ChainConfig, switch_at: float):
        self.base = base
        self.guidance_scale = chain.guidance_scale
        self.num_inference_steps = chain.num_inference_steps
        self.switch_step = switch_step(switch_at, chain.num_inference_steps)
        self.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)
        self.scheduler.set_timesteps(chain.num_inference_steps, device=base.device)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """z_T for each seed: (B, C, h, w). Drawn on the CPU, so every device starts from the same noise."""
        shape = self.base.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        latents = torch.stack(rows).to(self.base.device, self.base.pipe.unet.dtype)
        return latents * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def prefix(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents at the switch, (B, C, h, w): the part of the chain that belongs to the frozen model."""
        prompt_embeds = self.base.prompt_embeds(prompts, self.base.text_encoder)
        latents = self.noise(seeds)
        for step_index in range(self.switch_step):
            latents = self._step(latents, prompt_embeds, step_index, self.base.pipe.unet)
        return latents

    def finish(
        self,
        prefix: Tensor,
        prompt_embeds: Tensor,
        unet: nn.Module | None = None,
        grad_steps: int = 0,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Latents z_0, (B, C, h, w), from the latents at the switch.

        prompt_embeds: (2B, L, D), see `Base.prompt_embeds`.  unet: None is the base's own.
        The last `grad_steps` steps carry gradient to prompt_embeds, and to `unet` where it is trained; the others
        carry none (truncated backpropagation: K in paper section 3.2.2; AlignProp; DRaFT-K).
        """
        latents, unet = prefix, unet or self.base.pipe.unet
        first_with_grad = self.num_inference_steps - grad_steps
        for step_index in range(self.switch_step, self.num_inference_steps):
            carries_grad = step_index >= first_with_grad and torch.is_grad_enabled()
            with torch.set_grad_enabled(carries_grad):
                if carries_grad and gradient_checkpointing:
                    latents = checkpoint(self._step, latents, prompt_embeds, step_index, unet, use_reentrant=False)
                else:
                    latents = self._step(latents, prompt_embeds, step_index, unet)
        return latents

    def _step(self, latents: Tensor, prompt_embeds: Tensor, step_index: int, unet: nn.Module) -> Tensor:
        """One guided step: eps = uncond + guidance_scale * (cond - uncond), both in one batch."""
        timestep = self.scheduler.timesteps[step_index]
        pair = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        uncond, cond = unet(pair, timestep, encoder_hidden_states=prompt_embeds).sample.chunk(2)
        noise_pred = uncond + self.guidance_scale * (cond - uncond)
        return self.scheduler.step(noise_pred, timestep, latents).prev_sample

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable, clamped like the pipeline's own post-processing."""
        vae = self.base.pipe.vae
        images = vae.decode(latents / vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tuned: TunedModel | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], one for each prompt and its seed.

        tuned: None draws with the base alone.  prefix: latents at the switch, from `prefix`; computed
        here when not given, and only then are the seeds read.
        """
        if prefix is None:
            prefix = self.prefix(prompts, seeds)
        latents = prefix.to(self.base.device, self.base.pipe.unet.dtype)
        encoder = tuned.text_encoder if tuned else self.base.text_encoder
        unet = tuned.unet if tuned else None
        prompt_embeds = self.base.prompt_embeds(prompts, encoder)
        return self.decode(self.finish(latents, prompt_embeds, unet))
