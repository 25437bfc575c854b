"""How many pixels of the base's images are saturated, and what their gradient adds to the gradient of the images.

    python -m benchmarks.saturated_pixels [--profile tiny] [--prompts 48] [--mix balanced]

A pixel value is saturated when the decoder's output lies outside [0, 1] before the clamp. A hard clamp gives it no
gradient; ours passes it on (`Sampler.decode`). The gradient is that of the mix's loss with respect to the images, and
with respect to the latents z_0, once with each clamp.
"""

import argparse

import torch
from torch import Tensor

from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, load
from textcraftor.models.base import load_base
from textcraftor.rewards import RewardMix, load_rewards
from textcraftor.tiny.language import sample_prompts


def measure(config: Config, mix: str, count: int) -> dict[str, float]:
    """Share of saturated values; the norm of the gradient with both clamps, to the images and to z_0; their cosine."""
    weights = {name: weight for name, weight in config.mix[mix].items() if weight}
    device = torch.device("cpu")
    base, rewards = load_base(config.base, device), load_rewards(config.rewards, weights, device)
    reward_mix, prompts = RewardMix(rewards, weights), sample_prompts(count, 0, 0.6)
    features = {name: reward.text_features(prompts) for name, reward in rewards.items()}
    sampler = Sampler(base, config.chain, config.sampler.switch_at)
    with torch.no_grad():
        latents = sampler.finish(sampler.prefix(prompts, range(count)), base.conditioning(prompts))
        decoded = sampler.call_decoder(base.pipe.vae, base.vae_input(latents)).float() / 2 + 0.5
    saturated = (decoded < 0) | (decoded > 1)
    latents.requires_grad_(True)
    images = sampler.decode(latents)
    total, _ = reward_mix(images, features)
    (to_images,) = torch.autograd.grad(-total.mean(), images, retain_graph=True)
    passed, cut = (
        torch.autograd.grad(images, latents, gradient, retain_graph=True)[0]
        for gradient in (to_images, to_images.masked_fill(saturated, 0))
    )
    return {
        "share of values that are saturated": float(saturated.float().mean()),
        "share of images with any": float(saturated.flatten(1).any(1).float().mean()),
        "largest distance from [0, 1]": float((decoded - decoded.clamp(0, 1)).abs().max()),
        "gradient norm, images: straight-through / hard": _ratio(to_images, to_images.masked_fill(saturated, 0)),
        "gradient norm, z_0: straight-through / hard": _ratio(passed, cut),
        "cosine of the two gradients of z_0": float(torch.cosine_similarity(passed.flatten(), cut.flatten(), dim=0)),
    }


def _ratio(first: Tensor, second: Tensor) -> float:
    return float(first.norm() / second.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--mix")
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    config = load("params.yaml", {}, options.profile)
    for name, value in measure(config, options.mix or config.mixes[0], options.prompts).items():
        print(f"{name:48} {value:.4f}")


if __name__ == "__main__":
    main()
