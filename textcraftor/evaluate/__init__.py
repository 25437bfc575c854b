"""Evaluation: the same prompts and noise for the base and every candidate; scores, statistics, a report."""

from pathlib import Path
from typing import TYPE_CHECKING

from textcraftor.config import Config

if TYPE_CHECKING:
    import torch


def evaluate(config: Config, candidate: str, root: Path, device: "torch.device") -> Path:
    """Evaluate `base` or a candidate; see `textcraftor.evaluate.run.evaluate`."""
    # Imported when used: the gate reads scores from this package, and needs neither torch nor a model.
    from textcraftor.evaluate import run

    return run.evaluate(config, candidate, root, device)
