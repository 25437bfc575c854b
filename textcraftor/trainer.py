"""Prompt-based fine-tuning (paper section 3.2.2, algorithm 1): the gradient of rewards, through the last
denoising steps, into the text encoder (or, in a second stage, into the UNet on the frozen tuned encoder).

Loss = -sum weight * reward; the sign is turned here, once. Where we differ from the published code:
docs/decisions/published-code.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.checkpoint import Checkpoint
from textcraftor.config import TuneConfig
from textcraftor.errors import TrainingError
from textcraftor.models import Base, TunedModel
from textcraftor.rewards import RewardMix
from textcraftor.sampler import Sampler
from textcraftor.trainset import Batch, TrainSet


@dataclass
class Trainer:
    """One module being tuned: the loop, its guard rails and its record."""

    base: Base
    sampler: Sampler
    mix: RewardMix
    train_set: TrainSet
    tune: TuneConfig
    tuned: TunedModel
    module: Any  # the one of `tuned` that receives gradient: a transformers or diffusers model

    def fit(self, folder: Path, key: str, watched: tuple[Sequence[str], Tensor]) -> list[dict[str, Any]]:
        """Run or resume to the last step; returns the history. State and grids are kept in `folder`.

        Raises TrainingError before the optimiser moves when a loss or gradient is not finite.
        """
        tune, console = self.tune, Console(stderr=True)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=tune.learning_rate, weight_decay=tune.weight_decay)
        checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
        done, history = checkpoint.restore(self.module, optimizer)
        self._announce(console, sum(p.numel() for p in parameters), done)
        if done == 0:
            self._grid(folder, 0, watched)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("training", total=tune.steps, completed=done)
            for step in range(done, tune.steps):
                started = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = tune.learning_rate * min(1.0, (step + 1) / max(1, tune.warmup_steps))
                optimizer.zero_grad(set_to_none=True)
                record = self._accumulate_gradient(step)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, tune.max_grad_norm)
                if not torch.isfinite(grad_norm):
                    raise TrainingError(
                        f"step {step}: the gradient is not finite. Lower train.learning_rate or weights; "
                        f"the state after the last checkpoint is kept in {checkpoint.path}"
                    )
                optimizer.step()
                history.append({"step": step + 1, **record, "grad_norm": float(grad_norm)})
                if (step + 1) % max(1, tune.steps // 15) == 0:
                    console.print(_line(history[-1], tune.steps, time.monotonic() - started), highlight=False)
                if (step + 1) % tune.grid_every == 0 or step + 1 == tune.steps:
                    self._grid(folder, step + 1, watched)
                if (step + 1) % tune.checkpoint_every == 0 or step + 1 == tune.steps:
                    checkpoint.save(step + 1, self.module, optimizer, history)
                progress.advance(bar)
        return history

    def _accumulate_gradient(self, step: int) -> dict[str, float]:
        """The gradient of one optimiser step, summed over micro batches; returns loss and mean rewards."""
        tune, totals = self.tune, dict[str, float]()
        for micro in range(tune.accumulation):
            position = (step * tune.accumulation + micro) * tune.batch_size
            batch = self.train_set.batch(position, tune.batch_size, tune.seed, self.base.device)
            loss, rewards = self.loss(batch)
            (loss / tune.accumulation).backward()
            for name, value in {"loss": loss.detach(), **rewards}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / tune.accumulation
        return totals

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """-(weighted sum of rewards), mean over the batch, with its graph; and each reward's mean without.

        Raises TrainingError naming the reward that is not finite.
        """
        conditioning, tune = self.base.conditioning(batch.prompts, self.tuned), self.tune
        latents = self.sampler.finish(
            batch.latents, conditioning, self.tuned.unet, tune.grad_steps, tune.gradient_checkpointing
        )
        total, rewards = self.mix(self.sampler.decode(latents), batch.text_features)
        broken = [name for name, values in rewards.items() if not torch.isfinite(values).all()]
        if broken:
            raise TrainingError(
                f"Reward {', '.join(broken)} is not finite for a prompt among {batch.prompts[:3]}...; "
                "nothing was updated. Lower the learning rate, or leave the reward out of the mix"
            )
        return -total.mean(), {name: values.detach().mean() for name, values in rewards.items()}

    def _grid(self, folder: Path, step: int, rows: tuple[Sequence[str], Tensor]) -> None:
        prompts, prefix = rows
        images = pictures.to_bytes(self.sampler.generate(prompts, [], self.tuned, prefix))
        with written_aside(folder / "grids" / f"step_{step:06d}.png") as aside:
            pictures.save(pictures.side_by_side(prompts, {f"step {step}": list(map(pictures.picture, images))}), aside)

    def _announce(self, console: Console, trainable: int, done: int) -> None:
        """The derived numbers, before the work starts."""
        tune = self.tune
        samples = tune.batch_size * tune.accumulation
        console.print(
            f"{trainable:,} trainable parameters · {len(self.train_set.prompts):,} prompts · {tune.steps} steps of "
            f"{tune.batch_size} x {tune.accumulation} = {samples} samples · gradient through {tune.grad_steps} of "
            f"{self.sampler.num_inference_steps} denoising steps" + (f" · resumed after step {done}" if done else ""),
            highlight=False,
        )


def _line(record: dict[str, Any], steps: int, seconds: float) -> str:
    values = " ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
    return f"step {record['step']}/{steps}  {values}  {seconds:.1f} s/step"
