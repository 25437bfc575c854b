"""Style sheets: the same prompts and noise, drawn by many blends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, Term, Weights
from textcraftor.errors import ConfigError, ModelError
from textcraftor.generate import not_finite
from textcraftor.models.base import load_base
from textcraftor.models.blended import BlendedModel, load_blend

CELL = 128  # pixels


def draw_strengths(
    start: str,
    end: str,
    strengths: Sequence[float],
    parts: Mapping[str, Candidate],
    run: Config,
    prompts: Sequence[str],
    seed: int,
    out: Path,
    device: torch.device,
) -> None:
    """Write a PNG with a column for each prompt and a row for each strength of `end`, the rest of `start`.

    Raises ConfigError for no strength, or one that is not finite.
    """
    if not strengths:
        raise ConfigError("--strengths is empty. Write, for instance, '0 0.5 1'")
    weights = [Weights((Term(start, round(1 - each, 6)), Term(end, each))) for each in strengths]
    drawn = _draw(weights, parts, run, prompts, seed, device)
    rows = {f"{strength:g}": images for strength, images in zip(strengths, drawn, strict=True)}
    _save(out, f"{end} in place of {start}, by strength", pictures.side_by_side(prompts, rows, columns=len(prompts), cell=CELL))


def draw_triangle(
    names: Sequence[str],
    divisions: int,
    parts: Mapping[str, Candidate],
    run: Config,
    prompts: Sequence[str],
    seed: int,
    out: Path,
    device: torch.device,
) -> None:
    """Write a PNG with a triangle of pictures for each prompt: the three encoders at its corners, their blends between."""
    rows = [
        [((divisions - row) / divisions, (row - column) / divisions, column / divisions) for column in range(row + 1)]
        for row in range(divisions + 1)
    ]
    points = [point for row in rows for point in row]
    weights = [Weights(tuple(Term(name, share) for name, share in zip(names, point, strict=True))) for point in points]
    drawn = dict(zip(points, _draw(weights, parts, run, prompts, seed, device), strict=True))
    sheets = []
    for number, prompt in enumerate(prompts):
        cells = [[(" ".join(f"{share:.2g}" for share in point), drawn[point][number]) for point in row] for row in rows]
        sheets.append(pictures.titled(f"{prompt}: {' '.join(names)}", pictures.triangle(cells, CELL)))
    _save(out, "", pictures.stack(sheets))


def _draw(
    weights: Sequence[Weights],
    parts: Mapping[str, Candidate],
    run: Config,
    prompts: Sequence[str],
    seed: int,
    device: torch.device,
) -> list[list[Image.Image]]:
    """Pictures of all prompts, for each of the blends, from the same noise."""
    base = load_base(run.base, device)
    sampler, seeds = Sampler(base, run.chain, run.sampler.switch_at), [seed] * len(prompts)
    models = load_blend(parts, Weights(tuple(Term(name, 1.0) for name in parts)), base).models
    prefix = sampler.prefix(prompts, seeds)
    found = []
    for each in weights:
        images = sampler.generate(prompts, seeds, BlendedModel(models, each), prefix)
        if not images.isfinite().all():
            raise ModelError(not_finite(prompts[0]))
        found.append([pictures.picture(image) for image in pictures.to_bytes(images)])
    return found


def _save(out: Path, title: str, sheet: Image.Image) -> None:
    with written_aside(out) as aside:
        pictures.save(pictures.titled(title, sheet) if title else sheet, aside)
