"""A blend of candidates in our own chain: the weighted sum of what their encoders say, or their merged weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from textcraftor.candidate import Candidate
from textcraftor.config import ORIGINAL, Weights
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, TunedModel, load_candidate
from textcraftor.models.conditioning import Conditioning


@dataclass(frozen=True)
class BlendedModel:
    """Models whose embeddings are blended. The UNet is the base's.

    models: by the names in `weights`; None is the base, `original`.
    """

    models: Mapping[str, TunedModel | None]
    weights: Weights

    unet = None  # as in a TunedModel without a UNet of its own

    def conditionings(
        self, base: Base, prompts: Sequence[str], first_step: int, num_inference_steps: int
    ) -> list[tuple[int, Conditioning]]:
        """(first step, conditioning) for each stretch of the chain from `first_step` on. Each encoder runs once."""
        stages = self.weights.stages(first_step, num_inference_steps)
        needed = {name for _, weights in stages for name in weights}
        said = {name: base.conditioning(prompts, model) for name, model in self.models.items() if name in needed}
        return [(step, _blend_conditionings(said, weights)) for step, weights in stages]


def load_model(candidate: Candidate, base: Base) -> TunedModel | BlendedModel | None:
    """What draws a candidate: its modules, those of a saved blend, or None for the base. Raises ModelError."""
    if candidate.blend is None:
        return load_candidate(candidate, base)
    require_recorded_parts(candidate)
    return load_blend(candidate.blend.parts, candidate.blend.weights, base)


def require_recorded_parts(candidate: Candidate) -> None:
    """Raises ModelError when an encoder of a saved blend is another than when it was saved."""
    for name, part in candidate.blend.parts.items() if candidate.blend else ():
        if part.digest != candidate.blend.digests[name]:  # type: ignore[union-attr]
            raise ModelError(f"{candidate.name}: its part {name} was changed after the blend was saved. Save the blend again")


def combine(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_k weights[k] * tensors[k], computed in float32, in the first's dtype. A single weight of 1 gives that very tensor."""
    (first, *_), dtype = weights, tensors[next(iter(weights))].dtype
    if weights == {first: 1.0}:
        return tensors[first]
    exact = torch.promote_types(dtype, torch.float32)
    return torch.stack([weight * tensors[name].to(exact) for name, weight in weights.items()]).sum(0).to(dtype)


def load_blend(candidates: Mapping[str, Candidate], weights: Weights, base: Base) -> BlendedModel:
    """The blend of these candidates and the base, their modules frozen. One that has no weight anywhere is not loaded.

    Raises ConfigError for a name without candidate, ModelError for one that does not fit the base or has a UNet of its own.
    """
    weights.require_known(candidates)
    used = {term.name for term in weights.terms if term.weight} - {ORIGINAL}
    if nested := [name for name in sorted(used) if candidates[name].blend]:
        raise ModelError(f"{', '.join(nested)} is a blend itself. Name its encoders instead, with the product of the weights")
    models: dict[str, TunedModel | None] = {name: load_candidate(candidates[name], base) for name in sorted(used)}
    for name, model in models.items():
        if model and model.unet:
            raise ModelError(
                f"{name} has a UNet of its own, and only embeddings are blended here. Blend text encoders alone, or merge "
                "the weights (--space weights)"
            )
    return BlendedModel({ORIGINAL: None, **models}, weights)


def merge(candidates: Mapping[str, Candidate], weights: Weights, base: Base) -> dict[str, nn.Module]:
    """One model with the weighted sum of the candidates' weights, by the pipeline's names for the modules that any of them has.

    A module that a candidate lacks counts as the base's.  Raises ModelError for a part that cannot be merged so, ConfigError
    for weights that change along the chain.
    """
    weights.require_known(candidates)
    if any((term.start, term.end) != (0, 1) for term in weights.terms):
        raise ModelError(f"Merged weights are the same in every step, and {weights} change. Use --space embeddings")
    ((_, shares),) = weights.stages(0, 1)
    loaded = {name: load_candidate(candidates[name], base) for name in shares if name != ORIGINAL}
    parts: dict[str, dict[str, nn.Module]] = {}
    for name, model in loaded.items():
        if model and model.negative_embedding:
            raise ModelError(f"{name} has a negative embedding, which is no weight of an encoder. Use --space embeddings")
        modules: dict[str, Any] = {**model.encoders, "unet": model.unet} if model else {}
        for part, module in modules.items():
            if module is not None:
                parts.setdefault(part, {})[name] = module
    return {part: _merged(part, modules, shares, base) for part, modules in parts.items()}


def _merged(part: str, modules: Mapping[str, nn.Module], shares: Mapping[str, float], base: Base) -> nn.Module:
    merged = base.trainable(part).requires_grad_(False)
    original = merged.state_dict()
    states = {name: modules[name].state_dict() if name in modules else original for name in shares}
    with torch.no_grad():
        blended = {
            key: combine({name: state[key] for name, state in states.items()}, shares) if value.is_floating_point() else value
            for key, value in original.items()
        }
        merged.load_state_dict({key: value.clone() for key, value in blended.items()})
    return merged


def _blend_conditionings(said: Mapping[str, Conditioning], weights: Mapping[str, float]) -> Conditioning:
    first = said[next(iter(weights))]
    prompt_embeds = combine({name: said[name].prompt_embeds for name in weights}, weights)
    pooled = {name: each.pooled for name in weights if (each := said[name]).pooled is not None}
    return replace(first, prompt_embeds=prompt_embeds, pooled=combine(pooled, weights) if pooled else None)
