"""Tuned text encoders and blends of them on any stock diffusers pipeline of the Stable Diffusion family.

    control = Control.from_folders({"balanced": folder}, {"original": 0.3, "balanced": 0.7})
    image = pipe(guidance_scale=7.5, **control(pipe, "a small red circle")).images[0]

The pipeline stays as it is: it gets embeddings in place of the prompt, and a callback that exchanges them at the switch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from textcraftor.candidate import Candidate
from textcraftor.chain.solver import step_of_call
from textcraftor.config import ORIGINAL, SamplerConfig, Weights, switch_step
from textcraftor.errors import ConfigError, ModelError
from textcraftor.models.base import TunedModel, load_modules, require_same_architecture
from textcraftor.models.blended import combine, require_recorded_parts

OUTPUTS: Final = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Results of a pipeline's `encode_prompt`, in its order: two of SD 1.x and 2.x, four of SDXL. Arguments of its call, too."""

Embeddings = dict[str, Tensor]  # by the names of OUTPUTS
Encode = Callable[[Any], Sequence[Tensor]]
"""(pipeline) -> what its `encode_prompt` returns with both halves of guidance: for prompt weighting and the like."""


class Control:
    """Text encoders, their weights, and the switch from the pipeline's own encoder to the blend.

    models: by the names in `weights`; `original` is the pipeline's own.  weights: see `Weights`; None: all of the one model,
    or a saved blend's own.
    switch_at: fraction of the chain from which on the blend conditions the UNet, as in sampling (paper table 4: 10 of 25).
    Raises ConfigError for unknown names and for weights that do not sum to 1.
    """

    def __init__(
        self,
        models: Mapping[str, TunedModel | Candidate],
        weights: Weights | Mapping[str, Any] | Sequence[str] | None = None,
        switch_at: float = SamplerConfig().switch_at,
    ) -> None:
        if weights is None:
            if len(models) != 1:
                raise ConfigError(f"{len(models)} encoders need weights, such as {{{', '.join(map(repr, models))}: ...}}")
            (only,) = models.values()
            if isinstance(only, Candidate) and only.blend:
                require_recorded_parts(only)
                models, weights = only.blend.parts, only.blend.weights
            else:
                weights = dict.fromkeys(models, 1.0)
        self.weights = Weights.of(weights)
        self.weights.require_known(models)
        if not 0 <= switch_at <= 1:
            raise ConfigError(f"switch_at = {switch_at} is outside 0..1 (fraction of the chain)")
        self.switch_at = switch_at
        self._stages(50)  # raises for impossible weights here rather than at the first picture
        used = {term.name for term in self.weights.terms if term.weight}
        self._models: dict[str, TunedModel | Candidate] = {name: each for name, each in models.items() if name in used}

    @classmethod
    def from_folders(
        cls,
        folders: Mapping[str, str | Path],
        weights: Weights | Mapping[str, Any] | Sequence[str] | None = None,
        switch_at: float = SamplerConfig().switch_at,
    ) -> "Control":
        """A control of candidates in folders (trained ones, downloaded versions).

        folders: by the names that the weights use.  Raises ModelError for a folder without a candidate.
        """
        return cls({name: Candidate.at(Path(folder)) for name, folder in folders.items()}, weights, switch_at)

    def __call__(
        self,
        pipe: Any,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        *,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        encode: Encode | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, in place of prompt and negative prompt.

        strength, num_inference_steps: of the call. They are returned too. img2img and inpainting begin within the chain, at
        a place that depends on them.  encode: embeds the prompt itself, called once for each encoder; `prompt` is then unused.
        Raises ModelError when an encoder does not fit the pipeline.
        """
        parameters = signature(type(pipe).__call__).parameters
        if strength is not None and "strength" not in parameters:
            raise ConfigError(f"{type(pipe).__name__} has no strength; leave it out")
        steps = num_inference_steps or parameters["num_inference_steps"].default
        noised = parameters["strength"].default if strength is None and "strength" in parameters else strength
        first_step = 0 if noised is None else _first_step(pipe.scheduler, steps, noised)

        if encode is None:
            words = [prompt] if isinstance(prompt, str) else list(prompt)
            negative = [negative_prompt] * len(words) if isinstance(negative_prompt, str) else negative_prompt

            def encode(pipe: Any) -> Sequence[Tensor]:
                return pipe.encode_prompt(
                    words,
                    device=pipe._execution_device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=True,
                    negative_prompt=negative,
                )

        learned_negative = negative_prompt in (None, "")
        said = {name: self._embed(pipe, name, encode, learned_negative) for name in (ORIGINAL, *self._models)}
        callback = _Callback(self, said, self._weights_at(first_step, steps))
        given = {"strength": strength, "num_inference_steps": num_inference_steps}
        return {
            **_blended(said, callback.first),
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": [*callback.inputs],
            **{name: value for name, value in given.items() if value is not None},
        }

    def _stages(self, num_inference_steps: int) -> list[tuple[int, dict[str, float]]]:
        first = switch_step(self.switch_at, num_inference_steps)
        before = [(0, {ORIGINAL: 1.0})] if first else []
        return [*before, *self.weights.stages(first, num_inference_steps)]

    def _weights_at(self, step: int, num_inference_steps: int) -> dict[str, float]:
        return [weights for start, weights in self._stages(num_inference_steps) if start <= step][-1]

    @torch.no_grad()
    def _embed(self, pipe: Any, name: str, encode: Encode, learned_negative: bool) -> Embeddings:
        """What one encoder says. A learned negative embedding stands for the empty negative prompt, and for no other."""
        if name == ORIGINAL:
            return dict(zip(OUTPUTS, encode(pipe), strict=False))
        model = self._models[name]
        if isinstance(model, Candidate):
            if model.blend:
                raise ModelError(f"{name} is a blend itself. Name its encoders instead, with the product of the weights")
            model = self._models[name] = load_modules(model, pipe)
        else:
            require_same_architecture(name, model, pipe)
        if model.unet:
            raise ModelError(f"{name} has a UNet of its own, and only embeddings are blended here. Blend text encoders alone")
        speaker = copy.copy(pipe)  # its components are the pipeline's, but for the encoders
        for part, encoder in model.encoders.items():
            setattr(speaker, part, encoder.to(pipe._execution_device))
        said = dict(zip(OUTPUTS, encode(speaker), strict=False))
        if model.negative_embedding and learned_negative:
            negative = said["negative_prompt_embeds"]
            said["negative_prompt_embeds"] = model.negative_embedding.weight.to(negative).expand_as(negative)
        return said


class _Callback:
    """`callback_on_step_end` of a pipeline: exchanges the embeddings where the next step has other weights."""

    def __init__(self, control: Control, said: Mapping[str, Embeddings], first: Mapping[str, float]) -> None:
        self.control, self.said, self.first = control, said, first
        pooled = "pooled_prompt_embeds" in said[ORIGINAL]
        self.inputs = {"prompt_embeds": OUTPUTS[:2], **({"add_text_embeds": OUTPUTS[2:]} if pooled else {})}

    def __call__(self, pipe: Any, index: int, timestep: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scheduler, control = pipe.scheduler, self.control
        call = index + _calls_left_out(scheduler.timesteps, pipe.num_timesteps, index, timestep)
        steps = scheduler.num_inference_steps
        now, later = (
            control._weights_at(step_of_call(each, len(scheduler.timesteps), steps, scheduler.order), steps)
            for each in (call, min(call + 1, len(scheduler.timesteps) - 1))
        )
        if index == 0 and now != self.first:
            raise ConfigError(
                f"This call begins at UNet call {call} of {len(scheduler.timesteps)}, where other weights hold than at the "
                "beginning. Give control the call's own settings: control(pipe, prompt, strength=..., num_inference_steps=...)"
            )
        return {} if now == later else self._exchanged(pipe, later, state)

    def _exchanged(self, pipe: Any, weights: Mapping[str, float], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pipeline's tensors with these weights: both halves of guidance where it is on, a row for each image or frame."""
        blended, found = _blended(self.said, weights), {}
        for name, (positive, negative) in self.inputs.items():
            halves = [blended[negative], blended[positive]] if pipe.do_classifier_free_guidance else [blended[positive]]
            rows = torch.cat(halves).to(state[name])
            found[name] = rows.repeat_interleave(len(state[name]) // len(rows), 0)
        return found


def _blended(said: Mapping[str, Embeddings], weights: Mapping[str, float]) -> Embeddings:
    return {name: combine({each: said[each][name] for each in weights}, weights) for name in said[ORIGINAL]}


def _first_step(scheduler: Any, num_inference_steps: int, strength: float) -> int:
    """The step of the whole chain at which img2img and inpainting begin, as the pipelines' `get_timesteps` has it."""
    tried = copy.deepcopy(scheduler)
    tried.set_timesteps(num_inference_steps)
    left_out = max(0, num_inference_steps - int(num_inference_steps * strength))
    return step_of_call(left_out * tried.order, len(tried.timesteps), num_inference_steps, tried.order)


def _calls_left_out(timesteps: Tensor, calls: int, index: int, timestep: Any) -> int:
    """UNet calls of the whole chain before the pipeline's first. img2img leaves some out; half an SDXL chain ends early."""
    offsets = range(len(timesteps) - calls, -1, -1)
    return next((each for each in offsets if timesteps[each + index] == timestep), 0)
