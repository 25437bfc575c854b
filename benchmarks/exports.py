"""Every export of a candidate, read again by diffusers' own loaders: how far its pictures differ from the tuned model's.

    python -m benchmarks.exports [--candidate data/encoders/balanced] [--ranks 4 16 64] [--steps 25]

Prints a Markdown table. Without a candidate it changes the base's encoder at random by an update of rank 8 to the attention
layers, and a little noise everywhere. The last row is the base itself: what an export that holds nothing would show.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

from textcraftor.candidate import Candidate
from textcraftor.config import load
from textcraftor.device import choose_device
from textcraftor.export import Format, differences, export, reload
from textcraftor.models.base import Base, TunedModel, load_base, load_candidate


def changed(base: Base) -> TunedModel:
    encoder: Any = base.trainable("text_encoder").requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in encoder.named_parameters():
        size = 0.02 * weight.std(correction=0)
        if "_proj.weight" in name:
            rank = 8
            weight += 10 * size * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1]) / rank**0.5
        weight += size * torch.randn_like(weight)
    return TunedModel(text_encoder=encoder)


def size_of(path: Path) -> float:
    """MB."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 1e6


def row(name: str, size: str, held: str, found: list[tuple[float, float]]) -> str:
    mean = sum(each for each, _ in found) / len(found)
    return f"| {name} | {size} | {held} | {mean:.2f} | {max(largest for _, largest in found):.0f} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args(arguments)
    config = load("params.yaml").at(Path.cwd())
    base = load_base(config.base, choose_device("auto", config.cpu_threads))
    tuned = load_candidate(Candidate.at(given.candidate), base) if given.candidate else changed(base)
    assert tuned
    print("| export | MB | holds of the change | mean difference, of 255 | largest |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for to in get_args(Format):
            for rank in given.ranks if to.startswith("lora") else (0,):
                out = Path(folder) / to / (f"{rank}.safetensors" if to not in ("diffusers", "pipeline") else "model")
                made = export(tuned, base, to, out, rank)
                found = differences(reload(to, out, base), tuned, base, steps=given.steps)
                name = f"`{to}`" + (f", rank {rank}" if rank else "")
                print(row(name, f"{size_of(out):.1f}", f"{1 - made.lost:.1%}", found), flush=True)
    print(row("the base", "", "0.0%", differences(base.pipe, tuned, base, steps=given.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
