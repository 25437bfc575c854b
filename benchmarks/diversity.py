"""Which measure of diversity tells collapse from right agreement: every measure on models whose diversity is known.

    python -m benchmarks.diversity [--prompts 96] [--candidates balanced aesthetic] [--collapse-steps 60]

Draws the first held-out prompts, as often as an evaluation does, with
- the truth: random scenes in which every claim holds, rendered and passed through the base's autoencoder, which limits what
  any tuned model can draw. Nothing here collapses, and all images agree in what the prompt names;
- the base and the candidates;
- `same noise`: the base with one noise for all images of a prompt. Collapsed within prompts;
- `collapsed`, with --collapse-steps: a text encoder that is trained here on the aesthetic reward alone, without the CLIP
  constraint, at a high learning rate (the paper's figure 6). Collapsed over prompts.
Prints a Markdown table of both oracle measures, and of the diversity in each reward's image features, over the base's. Needs
the output of `textcraftor prepare`, and trained candidates.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textcraftor.ablation import workspaces
from textcraftor.cache.prepare import heldout_rows, read_heldout_latents
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, load, written
from textcraftor.device import choose_device
from textcraftor.evaluate.generation import from_bytes
from textcraftor.evaluate.judging import diversity
from textcraftor.layout import BASE, STATE
from textcraftor.models.base import Base, load_base, load_candidate
from textcraftor.pictures import to_bytes
from textcraftor.rewards import load_reward
from textcraftor.tiny.diversity import open_by_kind, open_diversity, true_scene, variety, variety_by_kind
from textcraftor.tiny.language import parse
from textcraftor.tiny.oracle import Oracle, detect
from textcraftor.tiny.recipe.batches import render_batch

TRUTH, SAME_NOISE, COLLAPSED = "truth", "same noise", "collapsed"
BATCH = 64


def reconstruct(base: Base, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] after the base's autoencoder."""
    vae = base.pipe.vae
    decoded = [vae.decode(vae.encode(each * 2 - 1).latent_dist.mode()).sample / 2 + 0.5 for each in images.split(BATCH)]
    return torch.cat(decoded).clamp(0, 1)


def collapse(config: Config, params: Path, steps: int) -> Candidate:
    """A text encoder trained on the aesthetic reward alone, in a workspace of its own; kept, and found again."""
    root = params.parent.resolve()
    folder = root / STATE / "collapsed" / workspaces.key(config, root, steps)
    links = {name: root / name for name in ("profiles", "data/tiny", "data/prompts", "data/latents", "data/sources")}
    train = {"allow_without_clip": True, "steps": steps, "learning_rate": 5e-4, "batch_size": 12}
    settings = {"mixes": [COLLAPSED], "mix": {COLLAPSED: {"aesthetic": 1}}, "train": train}
    made = workspaces.make(folder, written(params), settings, links)
    if not (folder / "data/encoders" / COLLAPSED).is_dir():
        workspaces.run(made, "train", "--mix", COLLAPSED)
    return Candidate.find(COLLAPSED, folder)


@torch.inference_mode()
def draw(config: Config, root: Path, candidates: Sequence[Candidate], count: int) -> tuple[list[str], dict[str, Tensor]]:
    """(prompts, model -> images (N, 3, H, W) uint8), the images of a prompt adjacent."""
    each = config.evaluate.images_per_prompt
    rows = slice(0, count * each)
    prompts, latents = heldout_rows(config, root)[0][rows], read_heldout_latents(config, root)[rows]
    base = load_base(config.base.at(root), choose_device("cpu", config.cpu_threads))
    sampler, rng = Sampler(base, config.chain, config.sampler.switch_at), np.random.default_rng(0)
    claims = [parsed for prompt in prompts if (parsed := parse(prompt))]
    drawn = {TRUTH: to_bytes(reconstruct(base, render_batch([true_scene(each, rng) for each in claims], rng)))}
    for candidate in (Candidate(BASE), *candidates):
        tuned = load_candidate(candidate, base)
        batches = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        drawn[candidate.name] = torch.cat([to_bytes(sampler.generate(prompts[at], [], tuned, latents[at])) for at in batches])
    drawn[SAME_NOISE] = drawn[BASE][::each].repeat_interleave(each, 0)
    return prompts, drawn


@torch.inference_mode()
def measure(config: Config, root: Path, prompts: Sequence[str], drawn: dict[str, Tensor]) -> str:
    """Two Markdown tables: every measure, then the oracle's two by kind of claim."""
    each = config.evaluate.images_per_prompt
    rewards = {name: reward for name, reward in config.rewards.items() if reward.kind not in ("contrast", "diversity")}
    judges = {name: load_reward(name, reward.at(root)).image_features for name, reward in rewards.items()}

    def spread(features: Callable[[Tensor], Tensor], images: Tensor) -> float:
        return float(diversity(torch.cat([features(from_bytes(part)) for part in images.split(BATCH)]), each).mean())

    of_base = {name: spread(features, drawn[BASE]) for name, features in judges.items()}
    lines = ["| | claims that hold | oracle_diversity | oracle_variety |" + "".join(f" {name} |" for name in judges)]
    kinds = [
        "| | open: | place | relation | background | style | variety: | count | colour | shape | size | background | style |"
    ]
    for name, images in drawn.items():
        scenes, held = detect(from_bytes(images)), Oracle().score(from_bytes(images), prompts).mean()
        figures = [measured(scenes, prompts, each).mean() for measured in (open_diversity, variety)]
        ratios = [spread(features, images) / of_base[judge] for judge, features in judges.items()]
        lines.append(f"| {name} | {held:.3f} | " + " | ".join(f"{value:.2f}" for value in (*figures, *ratios)) + " |")
        opened, varied = open_by_kind(scenes, prompts, each), variety_by_kind(scenes, prompts, each)
        first = [_mean(opened[kind]) for kind in ("place", "relation", "background", "style")]
        second = [
            _mean(varied[kind]) if kind in varied else ""
            for kind in ("count", "colour", "shape", "size", "background", "style")
        ]
        kinds.append(f"| {name} | | " + " | ".join(first) + " | | " + " | ".join(second) + " |")
    tables = [[table[0], "|---|" + "---:|" * (table[0].count("|") - 2), *table[1:]] for table in (lines, kinds)]
    return "\n\n".join("\n".join(table) for table in tables)


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():.2f} ({len(known)})" if 0 < len(known) < len(values) else f"{known.mean():.2f}" if len(known) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--candidates", nargs="*", help="default: the mixes of params.yaml")
    parser.add_argument("--collapse-steps", type=int, default=0)
    options = parser.parse_args()
    config, root = load(options.params), options.params.parent
    names = options.candidates if options.candidates is not None else config.mixes
    candidates = [Candidate.find(name, root) for name in names]
    if options.collapse_steps:
        candidates.append(collapse(config, options.params, options.collapse_steps))
    print(measure(config, root, *draw(config, root, candidates, options.prompts)))


if __name__ == "__main__":
    main()
