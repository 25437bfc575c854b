"""Generation of all images of one candidate, from the same prompts and noise for every candidate."""

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from textcraftor.cache.prepare import heldout_rows
from textcraftor.config import Config
from textcraftor.distributed import data_parallel
from textcraftor.errors import ModelError, PromptError
from textcraftor.evaluate.batches import Batches, console
from textcraftor.generate import not_finite
from textcraftor.pictures import to_bytes

Generate = Callable[[Sequence[str], Sequence[int], slice], Tensor]
"""(prompts, seeds, rows) -> images (B, 3, H, W) in [0, 1]; `rows` index the plan, for latents cached by row."""


def plan(config: Config, root: Path) -> pl.DataFrame:
    """One row for each image to generate: prompt_id, prompt, seed, image_index; the images of a prompt are adjacent.

    The rows are those of the held-out prefix cache (`prepare.heldout_rows`).  Raises PromptError for fewer than two
    prompts, which have no spread.
    """
    prompts, prompt_ids, seeds = heldout_rows(config, root)
    each = config.evaluate.images_per_prompt
    held_out = len(prompts) // each
    if held_out < 2:
        raise PromptError(
            f"Evaluation needs at least 2 held-out prompts, got {held_out}. "
            "Add prompts to the sources and run `textcraftor curate`"
        )
    if held_out < config.evaluate.prompts and data_parallel.rank() == 0:
        requested = config.evaluate.prompts
        console.print(f"evaluate.prompts = {requested}, but only {held_out} prompts are held out: all of those are used")
    schema = {"prompt_id": pl.String, "prompt": pl.String, "seed": pl.Int64, "image_index": pl.Int32}
    indices = [row % each for row in range(len(prompts))]
    return pl.DataFrame([prompt_ids, prompts, seeds, indices], schema=schema)


def generate_images(plan: pl.DataFrame, generate: Generate, batches: Batches) -> Tensor:
    """Every image of the plan, in its order: (N, 3, H, W) uint8 on the CPU.

    With several processes, each generates its own batches and has zeros in the other rows.
    Raises ModelError for an image with values that are not finite.
    """
    prompts, seeds = plan["prompt"].to_list(), plan["seed"].to_list()

    def generate_batch(rows: slice) -> Tensor:
        images = generate(prompts[rows], seeds[rows], rows)
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            prompt = prompts[rows.start + int(finite.logical_not().nonzero()[0])]
            raise ModelError(not_finite(prompt))
        return to_bytes(images)

    return batches.compute(generate_batch, "generate images")


def from_bytes(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1] on `device`."""
    return images.to(device, torch.float32) / 255
