"""One picture for a person: what the base draws and what the tuned model draws, from the same noise."""

from pathlib import Path

import torch

from textcraftor.artifact import written_aside
from textcraftor.candidate import Candidate
from textcraftor.config import Config
from textcraftor.grid import sample_grid
from textcraftor.models import load_base, load_candidate
from textcraftor.sampler import Sampler


def draw(config: Config, candidate: Candidate, prompt: str, seed: int, out: Path, device: torch.device) -> None:
    """Write a PNG to `out`: the base's image, and the candidate's beside it. Raises ModelError."""
    base = load_base(config.base, device)
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    tuned = load_candidate(candidate, base)
    prefix = sampler.prefix([prompt], [seed])
    images, captions = [sampler.generate([prompt], [seed], None, prefix)], ["base"]
    if tuned is not None:
        images.append(sampler.generate([prompt], [seed], tuned, prefix))
        captions.append(candidate.name)
    with written_aside(out) as aside:
        sample_grid(torch.cat(images), captions, columns=len(images), tile=256).save(aside)
