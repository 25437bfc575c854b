"""A picture of a blend beside the base's."""

from collections.abc import Mapping
from pathlib import Path

import torch

from textcraftor.candidate import Candidate
from textcraftor.config import BlendConfig, Config, Weights
from textcraftor.generate import draw_models
from textcraftor.models.base import Base, TunedModel, load_base
from textcraftor.models.blended import BlendedModel, load_blend, merge


def draw_blend(
    blend: BlendConfig, parts: Mapping[str, Candidate], run: Config, prompt: str, seed: int, out: Path, device: torch.device
) -> None:
    """Write a PNG to `out`: the base's image, and the blend's below it. Raises ModelError."""
    base = load_base(run.base, device)
    draw_models(run, base, {"blend": build_blend(blend, parts, base)}, prompt, seed, out)


def build_blend(blend: BlendConfig, parts: Mapping[str, Candidate], base: Base) -> BlendedModel | TunedModel:
    """The model of a blend, of embeddings or of weights. Raises ModelError when a part does not fit."""
    weights = Weights.of(blend.weights)
    if blend.space == "embeddings":
        return load_blend(parts, weights, base)
    return TunedModel(**merge(parts, weights, base))  # type: ignore[arg-type]
