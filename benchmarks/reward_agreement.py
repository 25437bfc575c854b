"""How often each tiny reward prefers the better of two images that the tiny base drew for one prompt.

    python -m benchmarks.reward_agreement --prompts 256

The better image is the one of which more claims hold, by the oracle. Prompts and noise are new to base and rewards. The
model card has the same table.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from textcraftor.layout import TINY
from textcraftor.tiny.language import sample_prompts
from textcraftor.tiny.oracle import Oracle
from textcraftor.tiny.recipe.agreement import (
    IMAGES_PER_PROMPT,
    LARGE_DIFFERENCE,
    pair_agreement,
    within_prompt_correlation,
)
from textcraftor.tiny.recipe.tokenizer import new_tokenizer
from textcraftor.tiny.recipe.validation import PROMPT_SEED, generate, load_aesthetic, load_towers, reward_scores


@torch.no_grad()
def main() -> None:
    """Draw, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rich", type=float, default=0.6, help="fraction of rich prompts")
    parser.add_argument("--models", type=Path, default=TINY, help="folder of the base and the rewards")
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(options.models / "base", dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = sample_prompts(options.prompts, PROMPT_SEED + 2, options.rich)
    images = generate(pipeline, prompts, IMAGES_PER_PROMPT)
    oracle, tokenizer = Oracle(), new_tokenizer()
    truth = torch.stack([oracle.score(images[:, n], prompts) for n in range(IMAGES_PER_PROMPT)], 1)
    scores = {
        name: reward_scores(towers, tokenizer, images, prompts)
        for name, towers in load_towers(options.models, torch.device("cpu")).items()
    }
    aesthetic = load_aesthetic(options.models)
    scores["aesthetic"] = torch.stack([aesthetic(images[:, n]) for n in range(IMAGES_PER_PROMPT)], 1)
    print(f"{options.prompts} prompts, {IMAGES_PER_PROMPT} images each, oracle {truth.mean():.3f}")
    print(f"| reward | agrees with the oracle | where it differs by {LARGE_DIFFERENCE} or more | correlation within a prompt |")
    print("|---|---|---|---|")
    for name, table in scores.items():
        large = pair_agreement(table, truth, LARGE_DIFFERENCE)
        correlation = within_prompt_correlation(table, truth)
        print(f"| {name} | {pair_agreement(table, truth):.3f} | {large:.3f} | {correlation:+.3f} |")


if __name__ == "__main__":
    main()
