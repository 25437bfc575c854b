"""Which features can measure diversity: compares correct images of the held-out prompts with the base's images.

    python benchmarks/diversity_of_truth.py

Renders four random scenes for each held-out prompt in which all of its claims hold, and passes them through the base's
autoencoder: what a perfect model would generate. Prints, for each judge's features, the diversity of these images
divided by that of the base's images. Needs the output of `textcraftor prepare`.
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
from textcraftor.tiny.diversity import true_scene
from textcraftor.tiny.language import parse
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe.batches import render_batch

PROMPTS = 96


def reconstruct(base: Base, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] after the base's autoencoder, which limits what any tuned model can generate."""
    vae = base.pipe.vae
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    return torch.as_tensor(vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def main() -> None:
    config, root = load(), Path()
    base = load_base(config.base, torch.device("cpu"))
    images_per_prompt = config.evaluate.images_per_prompt
    rows = slice(0, PROMPTS * images_per_prompt)
    prompts, latents = heldout_rows(config, root)[0][rows], read_heldout_latents(config, root)[rows]
    rng = np.random.default_rng(0)
    claims = [parsed for prompt in prompts if (parsed := parse(prompt))]
    truth = reconstruct(base, render_batch([true_scene(each, rng) for each in claims], rng))
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    generated = torch.cat(
        [sampler.generate(prompts[i : i + 64], [], None, latents[i : i + 64]) for i in range(0, len(prompts), 64)]
    )
    oracle = Oracle()
    base_score, truth_score = (oracle.score(images, prompts).mean() for images in (generated, truth))
    print(f"claims that hold: base {base_score:.3f}, truth {truth_score:.3f}")
    judges = {name: load_reward(name, config.rewards[name]).image_features for name in config.rewards if name != "contrast"}
    judges["raw latents"] = lambda images: base.pipe.vae.encode(images * 2 - 1).latent_dist.mode().flatten(1)
    for name, features in judges.items():
        of_truth, of_base = (diversity(features(images), images_per_prompt).mean() for images in (truth, generated))
        print(f"{name:20} diversity of the truth / of the base = {of_truth / of_base:.2f}")


if __name__ == "__main__":
    main()
