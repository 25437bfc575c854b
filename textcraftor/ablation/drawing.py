"""Pictures of a table's rows: the first held-out prompts, not chosen, from the same noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from PIL import Image

from textcraftor import pictures
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config
from textcraftor.evaluate.generation import plan
from textcraftor.models.base import load_base
from textcraftor.models.blended import load_model

PROMPTS: Final = 4


def draw(config: Config, candidates: Mapping[str, Candidate], root: Path, device: torch.device) -> Image.Image:
    """A grid with a row for each candidate, under its label.

    config: the run's, whose chain and switch they are all drawn with.
    """
    rows = plan(config, root).filter(image_index=0).head(PROMPTS)
    prompts, seeds = rows["prompt"].to_list(), rows["seed"].to_list()
    base = load_base(config.base.at(root), device)
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    prefix = sampler.prefix(prompts, seeds)
    drawn = {}
    for label, candidate in candidates.items():
        images = pictures.to_bytes(sampler.generate(prompts, seeds, load_model(candidate, base), prefix))
        drawn[label] = list(map(pictures.picture, images))
    return pictures.side_by_side(prompts, drawn)
