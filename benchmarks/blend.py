"""What blending does to the judges: strength 0 to 1 from one encoder to another, and embeddings against merged weights.

    python -m benchmarks.blend --to balanced [--from original] [--strengths 9] [--prompts 256] [--space embeddings weights]

Draws the first held-out prompts from the evaluation's latents and scores them with its judges. Prints a Markdown table for each
space: for each strength and judge the mean, with the 95 % interval of its difference from strength 0, paired over prompts;
and below, Spearman's rank correlation of strength and mean, and whether the means between lie between those at the ends.
Strength 0 from the original draws the base, bit for bit. Needs the output of `textcraftor prepare`, and trained candidates.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr

from textcraftor.cache.prepare import read_heldout_latents
from textcraftor.chain.sampler import Sampler
from textcraftor.config import BlendConfig, Config, Term, Weights, load
from textcraftor.device import choose_device
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.generation import generate_images, plan
from textcraftor.evaluate.judging import score
from textcraftor.evaluate.statistics import compare
from textcraftor.models.base import load_base
from textcraftor.rewards import load_reward
from textcraftor.style.drawing import build_blend
from textcraftor.style.parts import find_parts


def weights_at(start: str, end: str, strength: float) -> Weights:
    """`strength` of one encoder, the rest of the other."""
    return Weights((Term(start, round(1 - strength, 6)), Term(end, strength)))


def tables(
    config: Config,
    root: Path,
    ends: tuple[str, str],
    strengths: Sequence[float],
    space: str,
    prompts: int,
    device: torch.device,
) -> list[pl.DataFrame]:
    """Scores of each image, as an evaluation's, for each strength."""
    parts = find_parts(weights_at(*ends, 0.5), config, root)
    base = load_base(config.base.at(root), device)
    sampler, latents = Sampler(base, config.chain, config.sampler.switch_at), read_heldout_latents(config, root)
    rows = plan(config, root).head(prompts * config.evaluate.images_per_prompt)
    batches, found = Batches(rows.height, config.evaluate.batch_size), []
    for strength in strengths:
        written = tuple(map(str, weights_at(*ends, strength).terms))
        blend = BlendConfig.model_validate({"weights": written, "space": space})
        model = build_blend(blend, parts, base)
        with torch.inference_mode():
            images = generate_images(
                rows, lambda words, seeds, at, model=model: sampler.generate(words, seeds, model, latents[at]), batches
            )
            judge = score(
                images,
                rows,
                config.evaluate,
                lambda name: load_reward(name, config.rewards[name].at(root), device),
                device,
                batches,
            )
        found.append(judge)
    return found


def report(config: Config, scored: Sequence[pl.DataFrame], strengths: Sequence[float]) -> str:
    """The Markdown table of one space."""
    judges = config.evaluate.judges
    figures = [compare(each, scored[0], judges, (), config.evaluate)["judges"] for each in scored]
    lines = ["| strength | " + " | ".join(judges) + " |", "|---:|" + "---:|" * len(judges)]
    for strength, of_judges in zip(strengths, figures, strict=True):
        cells = [f"{each['mean']:.4f} ({each['ci_low']:+.4f} .. {each['ci_high']:+.4f})" for each in map(of_judges.get, judges)]
        lines.append(f"| {strength:.3g} | " + " | ".join(cells) + " |")
    means = {judge: np.array([each[judge]["mean"] for each in figures]) for judge in judges}
    ranks = [f"{spearmanr(strengths, each).statistic:+.2f}" if np.ptp(each) else "constant" for each in means.values()]
    between = ["yes" if _lies_between(each) else "no" for each in means.values()]
    return "\n".join([*lines, f"| Spearman | {' | '.join(ranks)} |", f"| between the ends | {' | '.join(between)} |"])


def _lies_between(means: np.ndarray) -> bool:
    low, high = sorted((means[0], means[-1]))
    return bool(((low <= means) & (means <= high)).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--from", dest="start", default="original")
    parser.add_argument("--to", required=True)
    parser.add_argument("--strengths", type=int, default=9, help="how many, from 0 to 1")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--space", nargs="+", choices=["embeddings", "weights"], default=["embeddings"])
    options = parser.parse_args()
    config, root = load(options.params), options.params.parent
    strengths = [number / (options.strengths - 1) for number in range(options.strengths)]
    device, ends = choose_device("auto", config.cpu_threads), (options.start, options.to)
    for space in options.space:
        scored = tables(config, root, ends, strengths, space, options.prompts, device)
        print(f"{options.start} to {options.to}, {space}, {options.prompts} prompts\n\n{report(config, scored, strengths)}\n")


if __name__ == "__main__":
    main()
