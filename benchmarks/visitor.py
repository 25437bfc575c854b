"""What a visitor types first: how often base and tuned model draw it right, and the pictures.

    python -m benchmarks.visitor [--candidate balanced] [--seeds 10] [--out docs/visitor.png]

Prints a Markdown table of right drawings (every claim of the prompt holds, by the oracle), of base and candidate from the
same noise, and writes all the pictures, none chosen. Without --candidate it takes the gate's winner.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from textcraftor import pictures
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, load
from textcraftor.device import choose_device
from textcraftor.errors import ModelError
from textcraftor.evaluate.claims import tick_claims
from textcraftor.layout import BASE, GATE_RECORD
from textcraftor.models.base import load_base, load_candidate

PROMPTS = (
    "a small red circle on a white background, flat",
    "a small blue square on a white background, flat",
    "a tiny crimson disc beneath a huge azure box, shiny",  # the README's examples
    "a tiny crimson disc",
    "a red star",
    "a big azure ball",
)
CELL = 128  # pixels


def draw(config: Config, candidate: Candidate, root: Path, seeds: range, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """{prompt: {model: images (len(seeds), 3, H, W) uint8}}, base and candidate from the same noise."""
    base = load_base(config.base.at(root), device)
    sampler, tuned = Sampler(base, config.chain, config.sampler.switch_at), load_candidate(candidate, base)
    drawn = {}
    for prompt in PROMPTS:
        prompts, prefix = [prompt] * len(seeds), sampler.prefix([prompt] * len(seeds), seeds)
        models = {BASE: None, candidate.name: tuned}
        drawn[prompt] = {
            name: pictures.to_bytes(sampler.generate(prompts, seeds, model, prefix)) for name, model in models.items()
        }
    return drawn


def table(ticks: dict[str, dict[str, list[list[pictures.Tick]]]]) -> str:
    """Markdown: for each prompt and model the pictures in which every claim holds, then each claim by itself."""
    lines = ["| prompt | model | right | each claim |", "|---|---|---:|---|"]
    for prompt, models in ticks.items():
        for name, of_images in models.items():
            right = sum(all(holds for _, holds in each) for each in of_images)
            claims = [f"{claim[0][0]} {sum(holds for _, holds in claim)}" for claim in zip(*of_images, strict=True)]
            lines.append(f"| {prompt} | {name} | {right} of {len(of_images)} | {', '.join(claims)} |")
    return "\n".join(lines)


def sheet(drawn: dict[str, dict[str, Tensor]], ticks: dict[str, dict[str, list[list[pictures.Tick]]]]) -> Image.Image:
    """Every picture: a block of rows for each prompt, a column for each seed."""
    blocks = []
    for prompt, models in drawn.items():
        rows = {name: [pictures.picture(image) for image in images] for name, images in models.items()}
        count = len(next(iter(rows.values())))
        grid = pictures.side_by_side([f"seed {seed}" for seed in range(count)], rows, ticks[prompt], count, CELL)
        blocks.append(pictures.titled(prompt, grid))
    return pictures.stack(blocks)


def winner(root: Path) -> str:
    """The candidate that won the gate.  Raises ModelError when there is none."""
    path = root / GATE_RECORD
    name = json.loads(path.read_text(encoding="utf-8"))["winner"] if path.exists() else None
    if name is None:
        raise ModelError(f"{path} names no winner. Name a candidate: --candidate balanced")
    return str(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--candidate", help="a mix, or a folder of tuned weights")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/visitor.png"))
    options = parser.parse_args()
    config, root = load(options.params), options.params.parent
    candidate = Candidate.find(options.candidate or winner(root), root)
    drawn = draw(config, candidate, root, range(options.seeds), choose_device("auto", config.cpu_threads))
    ticks = {
        prompt: {name: tick_claims(images, [prompt] * len(images)) for name, images in models.items()}
        for prompt, models in drawn.items()
    }
    print(table(ticks))
    pictures.save(sheet(drawn, ticks), options.out)
    print(f"\nPictures: {options.out}")


if __name__ == "__main__":
    main()
