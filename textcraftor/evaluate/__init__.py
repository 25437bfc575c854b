"""Evaluation: images of the base and each candidate from the same prompts and noise; scores, statistics, report, gate."""

from pathlib import Path
from typing import TYPE_CHECKING

from textcraftor.config import Config

if TYPE_CHECKING:
    import torch


def evaluate(config: Config, candidate: str, root: Path, device: "torch.device") -> Path:
    """Evaluate `base` or a candidate; see `textcraftor.evaluate.run.evaluate`."""
    # Imported here because the gate imports this package, and must not import torch.
    from textcraftor.evaluate import run

    return run.evaluate(config, candidate, root, device)
