"""Style sheets: the same prompts and noise, drawn by many blends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Subject:
    """What all pictures of a sheet share: encoders by name, the run's base and chain, prompts, and the seed of their noise."""

    parts: Mapping[str, Candidate]
    run: Config
    prompts: Sequence[str]
    seed: int
    device: torch.device

    def draw(self, weights: Sequence[Weights]) -> list[list[Image.Image]]:
        """Pictures of all prompts, for each of the blends, from the same noise."""
        base = load_base(self.run.base, self.device)
        sampler, seeds = Sampler(base, self.run.chain, self.run.sampler.switch_at), [self.seed] * len(self.prompts)
        models = load_blend(self.parts, Weights(tuple(Term(name, 1.0) for name in self.parts)), base).models
        prefix = sampler.prefix(self.prompts, seeds)
        found = []
        for each in weights:
            images = sampler.generate(self.prompts, seeds, BlendedModel(models, each), prefix)
            if not images.isfinite().all():
                raise ModelError(not_finite(self.prompts[0]))
            found.append([pictures.picture(image) for image in pictures.to_bytes(images)])
        return found


def draw_strengths(subject: Subject, start: str, end: str, strengths: Sequence[float], out: Path) -> None:
    """Write a PNG with a column for each prompt and a row for each strength of `end`, the rest of `start`.

    Raises ConfigError for no strength, or one that is not finite.
    """
    if not strengths:
        raise ConfigError("--strengths is empty. Write, for instance, '0 0.5 1'")
    drawn = subject.draw([Weights((Term(start, round(1 - each, 6)), Term(end, each))) for each in strengths])
    rows = {f"{strength:g}": images for strength, images in zip(strengths, drawn, strict=True)}
    sheet = pictures.side_by_side(subject.prompts, rows, columns=len(subject.prompts), cell=CELL)
    _save(out, f"{end} in place of {start}, by strength", sheet)


def draw_triangle(subject: Subject, names: Sequence[str], divisions: int, out: Path) -> None:
    """Write a PNG with a triangle of pictures for each prompt: the three encoders at its corners, their blends between."""
    rows = [
        [((divisions - row) / divisions, (row - column) / divisions, column / divisions) for column in range(row + 1)]
        for row in range(divisions + 1)
    ]
    points = [point for row in rows for point in row]
    weights = [Weights(tuple(Term(name, share) for name, share in zip(names, point, strict=True))) for point in points]
    drawn = dict(zip(points, subject.draw(weights), strict=True))
    sheets = []
    for number, prompt in enumerate(subject.prompts):
        cells = [[(" ".join(f"{share:.2g}" for share in point), drawn[point][number]) for point in row] for row in rows]
        sheets.append(pictures.titled(f"{prompt}: {' '.join(names)}", pictures.triangle(cells, CELL)))
    _save(out, "", pictures.stack(sheets))


def _save(out: Path, title: str, sheet: Image.Image) -> None:
    with written_aside(out) as aside:
        pictures.save(pictures.titled(title, sheet) if title else sheet, aside)
