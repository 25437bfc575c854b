"""Which features may measure diversity: what a model that draws the truth would score.

    python benchmarks/diversity_of_truth.py

For the held-out prompts it renders four scenes each for which every claim of the prompt holds, with all that the
prompt leaves open drawn at random, and passes them through the base's autoencoder: a perfect model. It prints their
diversity over that of the base's own images, feature by feature. Needs `textcraftor prepare` to have run.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textcraftor.cache.prepare import heldout_rows, read_heldout_latents
from textcraftor.chain.sampler import Sampler
from textcraftor.config import load
from textcraftor.evaluate.judging import diversity
from textcraftor.models.base import Base, load_base
from textcraftor.rewards import load_reward
from textcraftor.tiny.language import Claims, parse
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe.corpus import pictures
from textcraftor.tiny.scenes import Scene, Thing, sample_scene

PROMPTS = 96


def true_scene(claims: Claims, rng: np.random.Generator) -> Scene:
    """A scene for which all claims hold."""
    while True:
        other = sample_scene(rng, pair_fraction=float(len(claims.things) == 2))
        things = tuple(
            Thing(said.colour or any_.colour, said.shape or any_.shape, said.size or any_.size)
            for said, any_ in zip(claims.things, other.things, strict=True)
        )
        if len({thing.colour for thing in things}) == len(things):
            background, style = claims.background or other.background, claims.style or other.style
            return Scene(things, claims.relation or other.relation, background, style)


def through_autoencoder(base: Base, images: Tensor) -> Tensor:
    """What the best of models could draw: it has no other decoder."""
    vae = base.pipe.vae
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    return torch.as_tensor(vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def main() -> None:
    config, root = load(), Path()
    base = load_base(config.base, torch.device("cpu"))
    each = config.evaluate.images_per_prompt
    rows = slice(0, PROMPTS * each)
    prompts, latents = heldout_rows(config, root)[0][rows], read_heldout_latents(config, root)[rows]
    rng = np.random.default_rng(0)
    claims = [said for prompt in prompts if (said := parse(prompt))]
    truth = through_autoencoder(base, pictures([true_scene(said, rng) for said in claims], rng))
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    drawn = torch.cat(
        [sampler.generate(prompts[i : i + 64], [], None, latents[i : i + 64]) for i in range(0, len(prompts), 64)]
    )
    oracle = Oracle()
    print(f"claims that hold: base {oracle.score(drawn, prompts).mean():.3f}, truth {oracle.score(truth, prompts).mean():.3f}")
    judges = {name: load_reward(name, config.rewards[name]).image_features for name in config.rewards if name != "contrast"}
    judges["latents as they are"] = lambda images: base.pipe.vae.encode(images * 2 - 1).latent_dist.mode().flatten(1)
    for name, features in judges.items():
        of_truth, of_base = (diversity(features(images), each).mean() for images in (truth, drawn))
        print(f"{name:20} diversity of the truth / of the base = {of_truth / of_base:.2f}")


if __name__ == "__main__":
    main()
