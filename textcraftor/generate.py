"""`textcraftor generate`: images of one prompt from the base and from a candidate, from the same noise."""

from pathlib import Path

import torch

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.models.base import load_base, load_candidate


def draw(config: Config, candidate: Candidate, prompt: str, seed: int, out: Path, device: torch.device) -> None:
    """Write a PNG to `out`: the base's image, and the candidate's beside it. Raises ModelError."""
    base = load_base(config.base, device)
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    tuned = load_candidate(candidate, base)
    prefix = sampler.prefix([prompt], [seed])
    models = {"base": None} if tuned is None else {"base": None, candidate.name: tuned}
    rows = {}
    for label, model in models.items():
        (image,) = pictures.to_bytes(sampler.generate([prompt], [seed], model, prefix))
        rows[label] = [pictures.picture(image)]
    with written_aside(out) as aside:
        pictures.save(pictures.side_by_side([prompt], rows), aside)
