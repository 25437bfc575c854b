"""The differentiable denoising chain: two encoders, one switch, guidance, truncated gradient.

Steps before the switch are conditioned by the frozen text encoder (and use the frozen UNet). Steps from the switch on use
what is tuned, for the empty prompt as well. Training switches late and backpropagates through the last steps only;
sampling switches early (paper table 4). The first part depends on nothing that is tuned, so its state can be cached
and passed back as `prefix`: the latents and, for a multistep solver, its history. The chain then continues exactly as
it would have without the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textcraftor.chain.solver import History, Solver
from textcraftor.config import ChainConfig, switch_step
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, TunedModel
from textcraftor.models.blended import BlendedModel
from textcraftor.models.conditioning import Conditioning


class Sampler:
    """The chain of one base model with one switch: training's, or sampling's.

    Stateless between calls. Each prompt's noise comes from its own seed, so batch size, order and sharding change
    results by rounding only. Latents and the solver's arithmetic are float32 whatever the base's dtype; UNet and VAE
    get their inputs in the base's dtype.
    """

    def __init__(self, base: Base, chain: ChainConfig, switch_at: float):
        self.base = base
        self.guidance_scale = chain.guidance_scale
        self.num_inference_steps = chain.num_inference_steps
        self.switch_step = switch_step(switch_at, chain.num_inference_steps)
        self.solver = Solver(chain, base.pipe.scheduler.config, base.device)
        self.latents_dtype = torch.promote_types(base.dtype, torch.float32)
        # Module-level functions, so that `acceleration` can compile them for the tuned and the frozen model alike.
        self.call_unet: Callable[..., Tensor] = _call_unet
        self.call_decoder: Callable[..., Tensor] = _call_decoder

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        """(C', h, w) of one prefix: the latents' channels, and as many again for each tensor of the solver's history."""
        channels, height, width = self.base.latent_shape
        return channels * (1 + self.solver.history_length(self.switch_step)), height, width

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Initial latents z_T for each seed: (B, C, h, w). Drawn on the CPU, so every device starts from the same noise."""
        shape = self.base.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        latents = torch.stack(rows).to(self.base.device, self.latents_dtype)
        return latents * self.solver.init_noise_sigma

    @torch.no_grad()
    def prefix(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The chain's state at the switch, (B, C', h, w), computed by the frozen model alone. See `prefix_shape`."""
        conditioning = self.base.conditioning(prompts)
        latents = self.noise(seeds)
        history: History = ()
        for step_index in range(self.switch_step):
            latents, history = self._step(latents, history, conditioning, step_index, self.base.pipe.unet)
        return self.solver.pack(latents, history)

    def finish(
        self,
        prefix: Tensor,
        conditioning: Conditioning,
        unet: nn.Module | None = None,
        grad_steps: int = 0,
        gradient_checkpointing: bool = False,
        later: Sequence[tuple[int, Conditioning]] = (),
    ) -> Tensor:
        """Run the chain from the switch to its end: latents z_0, (B, C, h, w).

        prefix: (B, C', h, w), see `prefix`.  conditioning: of B prompts.  unet: None means the base's own.
        The last `grad_steps` steps carry gradient to the conditioning, and to `unet` where it is trained; the others
        carry none (truncated backpropagation: K in paper section 3.2.2; AlignProp; DRaFT-K).
        later: (step, conditioning) of those that take over from a later step.
        Raises ModelError when the prefix is of another base, solver or switch.
        """
        if prefix.shape[1:] != self.prefix_shape:
            raise ModelError(
                f"The prefix is {tuple(prefix.shape[1:])} (channels, height, width), and {self.solver.name} from step "
                f"{self.switch_step} of this base needs {self.prefix_shape}. Run `textcraftor prepare` again"
            )
        latents, history = self.solver.unpack(prefix.to(self.base.device, self.latents_dtype), self.switch_step)
        unet = unet or self.base.pipe.unet
        first_with_grad = self.num_inference_steps - grad_steps
        changes = dict(later)
        for step_index in range(self.switch_step, self.num_inference_steps):
            conditioning = changes.get(step_index, conditioning)
            carries_grad = step_index >= first_with_grad and torch.is_grad_enabled()
            with torch.set_grad_enabled(carries_grad):
                arguments = (latents, history, conditioning, step_index, unet)
                if carries_grad and gradient_checkpointing:
                    latents, history = checkpoint(self._step, *arguments, use_reentrant=False)
                else:
                    latents, history = self._step(*arguments)
        return latents

    def _step(
        self, latents: Tensor, history: History, conditioning: Conditioning, step_index: int, unet: nn.Module
    ) -> tuple[Tensor, History]:
        """One denoising step: one UNet call, or two for some solvers (`Solver.unet_calls`)."""
        for call in self.solver.unet_calls(step_index):
            noise_pred = self.predict_noise(latents, conditioning, call, unet)
            latents, history = self.solver.step(noise_pred, call, latents, history)
        return latents, history

    def predict_noise(self, latents: Tensor, conditioning: Conditioning, call: int, unet: nn.Module) -> Tensor:
        """The guided prediction uncond + guidance_scale * (cond - uncond), (B, C, h, w); both halves in one batch.

        call: index into `solver.timesteps`. A UNet may predict the velocity instead, as in SD 2.x; the solver knows.
        """
        model_input = self.solver.scale(latents, call).to(self.base.dtype)
        with self.base.autocast(unet):
            predicted = self.call_unet(
                unet, torch.cat([model_input, model_input]), self.solver.timesteps[call], conditioning.unet_inputs
            )
        uncond, cond = predicted.to(latents.dtype).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def predict_original(
        self, prefix: Tensor, conditioning: Conditioning, step_index: int, unet: nn.Module | None = None
    ) -> Tensor:
        """z_0 as predicted at `step_index`, (B, C, h, w); gradient through that one step (ReFL, `one_step`)."""
        latents, history = self.solver.unpack(prefix.to(self.base.device, self.latents_dtype), self.switch_step)
        unet = unet or self.base.pipe.unet
        with torch.no_grad():
            for earlier in range(self.switch_step, step_index):
                latents, history = self._step(latents, history, conditioning, earlier, unet)
        call = self.solver.unet_calls(step_index)[0]
        return self.solver.predict_original(self.predict_noise(latents, conditioning, call, unet), call, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped in value like the pipeline's own post-processing.

        Differentiable. The clamp passes the gradient of saturated pixels, or they could never leave white or black.
        """
        vae = self.base.pipe.vae
        images = self.call_decoder(vae, self.base.vae_input(latents))
        return cast(Tensor, _StraightThroughClamp.apply(images.float() / 2 + 0.5))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tuned: TunedModel | BlendedModel | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], one for each prompt and its seed.

        tuned: None draws with the base alone.  prefix: the state at the switch, from `prefix`. Without it the prefix is
        computed here from the seeds, which are not read otherwise.
        """
        if prefix is None:
            prefix = self.prefix(prompts, seeds)
        later: list[tuple[int, Conditioning]] = []
        if isinstance(tuned, BlendedModel):
            (_, conditioning), *later = tuned.conditionings(self.base, prompts, self.switch_step, self.num_inference_steps)
        else:
            conditioning = self.base.conditioning(prompts, tuned)
        return self.decode(self.finish(prefix, conditioning, tuned.unet if tuned else None, later=later))


class _StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose backward pass is the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def _call_unet(unet: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    return unet(latents, timestep, **inputs).sample


def _call_decoder(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample
