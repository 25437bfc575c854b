"""The differentiable denoising chain: two encoders, one switch, guidance, truncated gradient.

Steps before the switch are conditioned by the frozen encoder E0 (and the frozen UNet), steps from it on by what
is tuned, the empty prompt included. Training switches late and carries gradient through the last steps only;
sampling switches early (paper table 4). The first part depends on nothing that is tuned, so its state can be
cached and handed back as `prefix`: the latents, and for a multistep solver its history with them, so that the
chain goes on exactly as it would have without the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textcraftor.chain.solver import Memory, Solver
from textcraftor.config import ChainConfig, switch_step
from textcraftor.errors import ModelError
from textcraftor.kernels.twins import twins
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.conditioning import Conditioning


class Sampler:
    """The chain of one base model, with the switch of one use: training's, or sampling's.

    Stateless between calls; each prompt's noise comes from its own seed, so that batch size, order and sharding
    change results by rounding only. Latents and the solver's arithmetic are float32 whatever the base's dtype;
    UNet and VAE get their inputs in the base's.
    """

    def __init__(self, base: Base, chain: ChainConfig, switch_at: float):
        self.base = base
        self.guidance_scale = chain.guidance_scale
        self.num_inference_steps = chain.num_inference_steps
        self.switch_step = switch_step(switch_at, chain.num_inference_steps)
        self.solver = Solver(chain, base.pipe.scheduler.config, base.device)
        self.latents_dtype = torch.promote_types(base.dtype, torch.float32)
        # Functions of a module, so that `acceleration` can compile them for the tuned and the frozen one alike.
        self.call_unet: Callable[..., Tensor] = _call_unet
        self.call_decoder: Callable[..., Tensor] = _call_decoder

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        """(C', h, w) of one prefix: the latents' channels, and as many again for each tensor of the solver's history."""
        channels, height, width = self.base.latent_shape
        return channels * (1 + self.solver.memory_at(self.switch_step)), height, width

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """z_T for each seed: (B, C, h, w). Drawn on the CPU, so every device starts from the same noise."""
        shape = self.base.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        latents = torch.stack(rows).to(self.base.device, self.latents_dtype)
        return latents * self.solver.init_noise_sigma

    @torch.no_grad()
    def prefix(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The chain's state at the switch, (B, C', h, w): all that belongs to the frozen model. See `prefix_shape`."""
        conditioning = self.base.conditioning(prompts)
        latents = self.noise(seeds)
        memory: Memory = ()
        for step_index in range(self.switch_step):
            latents, memory = self._step(latents, memory, conditioning, step_index, self.base.pipe.unet)
        return self.solver.pack(latents, memory)

    def finish(
        self,
        prefix: Tensor,
        conditioning: Conditioning,
        unet: nn.Module | None = None,
        grad_steps: int = 0,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Latents z_0, (B, C, h, w), from the state at the switch.

        prefix: (B, C', h, w), see `prefix`.  conditioning: of B prompts.  unet: None is the base's own.
        The last `grad_steps` steps carry gradient to the conditioning, and to `unet` where it is trained; the others
        carry none (truncated backpropagation: K in paper section 3.2.2; AlignProp; DRaFT-K).
        Raises ModelError when the prefix is of another base, solver or switch.
        """
        if prefix.shape[1:] != self.prefix_shape:
            raise ModelError(
                f"The prefix is {tuple(prefix.shape[1:])} (channels, height, width), and {self.solver.name} from step "
                f"{self.switch_step} of this base needs {self.prefix_shape}. Run `textcraftor prepare` again"
            )
        latents, memory = self.solver.unpack(prefix.to(self.base.device, self.latents_dtype), self.switch_step)
        unet = unet or self.base.pipe.unet
        first_with_grad = self.num_inference_steps - grad_steps
        for step_index in range(self.switch_step, self.num_inference_steps):
            carries_grad = step_index >= first_with_grad and torch.is_grad_enabled()
            with torch.set_grad_enabled(carries_grad):
                arguments = (latents, memory, conditioning, step_index, unet)
                if carries_grad and gradient_checkpointing:
                    latents, memory = checkpoint(self._step, *arguments, use_reentrant=False)
                else:
                    latents, memory = self._step(*arguments)
        return latents

    def _step(
        self, latents: Tensor, memory: Memory, conditioning: Conditioning, step_index: int, unet: nn.Module
    ) -> tuple[Tensor, Memory]:
        """One guided step: eps = uncond + guidance_scale * (cond - uncond), both in one batch.

        What the UNet predicts may be the noise or, as in SD 2.x, the velocity: the solver knows.
        """
        for place in self.solver.evaluations(step_index):
            noise_pred = self.guided(latents, conditioning, place, unet)
            latents, memory = self.solver.step(noise_pred, place, latents, memory)
        return latents, memory

    def guided(self, latents: Tensor, conditioning: Conditioning, place: int, unet: nn.Module) -> Tensor:
        """What the UNet predicts at a place of the solver's timesteps, guided: (B, C, h, w)."""
        pair = twins(self.solver.scale(latents, place).to(self.base.dtype))
        with self.base.autocast(unet):
            predicted = self.call_unet(unet, pair, self.solver.timesteps[place], conditioning.unet_inputs)
        uncond, cond = predicted.to(latents.dtype).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def predict(self, prefix: Tensor, conditioning: Conditioning, at: int, unet: nn.Module | None = None) -> Tensor:
        """z_0 as predicted at step index `at`, (B, C, h, w); gradient through that one step (ReFL, `one_step`)."""
        latents, memory = self.solver.unpack(prefix.to(self.base.device, self.latents_dtype), self.switch_step)
        unet = unet or self.base.pipe.unet
        with torch.no_grad():
            for step_index in range(self.switch_step, at):
                latents, memory = self._step(latents, memory, conditioning, step_index, unet)
        place = self.solver.evaluations(at)[0]
        return self.solver.predicted_original(self.guided(latents, conditioning, place, unet), place, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable, clamped like the pipeline's own post-processing."""
        vae = self.base.pipe.vae
        images = self.call_decoder(vae, self.base.vae_input(latents))
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

        tuned: None draws with the base alone.  prefix: the state at the switch, from `prefix`; computed
        here when not given, and only then are the seeds read.
        """
        if prefix is None:
            prefix = self.prefix(prompts, seeds)
        conditioning = self.base.conditioning(prompts, tuned)
        return self.decode(self.finish(prefix, conditioning, tuned.unet if tuned else None))


def _call_unet(unet: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    return unet(latents, timestep, **inputs).sample


def _call_decoder(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample
