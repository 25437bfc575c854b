"""Prompt-based fine-tuning (paper section 3.2.2, algorithm 1): the gradient of rewards, through denoising steps, into
what is tuned (text encoder, negative embedding, or in a second stage the UNet on the frozen tuned encoder).

The loop and its guard rails; loss and gradient are `objective.py`. Where we differ from the published code:
docs/decisions/published-code.md.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor, nn

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.config import TuneConfig
from textcraftor.device import is_out_of_memory
from textcraftor.distributed import data_parallel
from textcraftor.distributed.fsdp import full_tensor, is_sharded
from textcraftor.errors import Preempted, RankFailure, TrainingError
from textcraftor.models.base import TunedModel
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.training.checkpoint import Checkpoint, Progress
from textcraftor.training.data import Batch, TrainSet
from textcraftor.training.ema import MovingAverage
from textcraftor.training.objective import Objective
from textcraftor.training.preemption import StopRequest, catch_sigterm

SUCCEEDED, STOP_REQUESTED, OUT_OF_MEMORY, FAILED = range(4)  # how a step went; of several processes, the worst counts


@dataclass
class Trainer:
    """One run of tuning: the loop, its guard rails and its record."""

    objective: Objective
    train_set: TrainSet
    tuned: TunedModel
    module: nn.Module  # of `tuned`, what holds every parameter that is trained
    negative_learning_rate: float = 5e-3  # a negative embedding among them has a rate of its own

    @property
    def tune(self) -> TuneConfig:
        """The settings, which the objective shares."""
        return self.objective.tune

    def fit(self, folder: Path, key: str, watched: tuple[Sequence[str], Tensor]) -> list[dict[str, Any]]:
        """Run or resume to the last step; returns the history. State and grids are kept in `folder`.

        The module ends with the weights to keep: the moving average where there is one.
        Raises TrainingError before the optimiser moves when a loss or gradient is not finite, or memory does not
        suffice even for half the micro batch; Preempted after SIGTERM. A checkpoint is written before either.
        With a split UNet a lack of memory raises RankFailure, and what was written before is what the run resumes from.
        """
        tune, console = self.tune, Console(stderr=True, quiet=data_parallel.rank() > 0)
        optimizer = adamw(self.module, tune, self.negative_learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        average = MovingAverage(self.module, tune.ema_decay)
        checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
        progress = checkpoint.restore(self.module, optimizer, average.weights)
        data_parallel.barrier()  # before one of them writes what the others still read
        self._print_run_summary(console, progress)

        def save() -> float:
            checkpoint.save(progress, self.module, optimizer, average.weights)
            return time.monotonic()

        if progress.done == 0:
            self._grid(folder, 0, watched)
        with Bar(console=console, transient=True) as bar, catch_sigterm() as stop:
            task = bar.add_task("training", total=tune.steps, completed=progress.done)
            saved = time.monotonic()
            while progress.done < tune.steps:
                started, step = time.monotonic(), progress.done
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * rate_factor(tune, step)
                try:
                    record = self._gradient(optimizer, progress, stop, console)
                except (TrainingError, Preempted):
                    save()
                    raise
                optimizer.step()
                progress.done += 1
                average.update(progress.done)
                progress.history.append({"step": progress.done, **record})
                if progress.done % max(1, tune.steps // 15) == 0:
                    console.print(_line(progress.history[-1], tune.steps, time.monotonic() - started), highlight=False)
                last = progress.done == tune.steps
                if last or progress.done % tune.grid_every == 0:
                    with average.applied():
                        self._grid(folder, progress.done, watched)
                if last or self._overdue(saved) or progress.done % tune.checkpoint_every == 0:
                    saved = save()
                bar.advance(task)
        average.copy_to_module()
        data_parallel.barrier()
        return progress.history

    def _gradient(
        self, optimizer: torch.optim.Optimizer, progress: Progress, stop: StopRequest, console: Console
    ) -> dict[str, float]:
        """The clipped gradient of one optimiser step, over all processes; a step that lacks memory is tried once more
        with half the micro batch and twice the accumulation."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            record, status, error = self._accumulate_gradients(progress, stop)
            worst = data_parallel.max_over_ranks(status, self.objective.base.device)
            if worst == SUCCEEDED:
                break
            if worst == STOP_REQUESTED:
                raise Preempted(
                    f"SIGTERM: stopped after step {progress.done}; the checkpoint is written. Run it again to resume"
                )
            if worst == FAILED:
                raise error or TrainingError("Another process stopped the run; its message says why")
            self._halve(progress, console)
        # What is split over the processes arrives averaged.
        data_parallel.all_reduce_mean(
            [p.grad for p in self.module.parameters() if p.grad is not None and not is_sharded(p.grad)]
        )
        record = data_parallel.mean_over_ranks(record, self.objective.base.device)
        clipped = [torch.nn.utils.clip_grad_norm_(group["params"], self.tune.max_grad_norm) for group in optimizer.param_groups]
        norms = [float(full_tensor(norm)) for norm in clipped]
        if not all(map(math.isfinite, [*norms, *record.values()])):
            raise TrainingError(self._nonfinite_message(progress))
        return {**record, "grad_norm": math.hypot(*norms)}

    def _accumulate_gradients(self, progress: Progress, stop: StopRequest) -> tuple[dict[str, float], int, Exception | None]:
        """One step's gradient, summed over the micro batches of this process, and how it went."""
        try:
            totals = dict[str, float]()
            accumulation = self.tune.accumulation * progress.split
            for batch in self._batches(progress):
                if self._stop_requested(stop):
                    return {}, STOP_REQUESTED, None
                values = self.objective.backward(batch, self.tuned, progress.done, 1 / accumulation)
                for name, value in values.items():
                    totals[name] = totals.get(name, 0.0) + value / accumulation
            return totals, SUCCEEDED, None
        except TrainingError as error:
            return {}, FAILED, error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if (
                self.objective.unet_is_sharded
            ):  # the others wait for this one inside the UNet, where no word can be had with them
                raise RankFailure(self._no_memory_message(progress)) from error
            return {}, OUT_OF_MEMORY, None

    def _stop_requested(self, stop: StopRequest) -> bool:
        """Whether SIGTERM has come; to any process, where all must stop at the same micro batch."""
        if not self.objective.unet_is_sharded:
            return stop.requested
        return bool(data_parallel.max_over_ranks(int(stop.requested), self.objective.base.device))

    def _overdue(self, saved: float) -> bool:
        """Whether the last checkpoint is too old, by any process's clock."""
        minutes = self.tune.checkpoint_minutes
        return minutes is not None and bool(
            data_parallel.max_over_ranks(int(time.monotonic() - saved > 60 * minutes), self.objective.base.device)
        )

    def _batches(self, progress: Progress) -> Iterator[Batch]:
        """This process's micro batches of the step; those of all processes are one stretch of the stream."""
        tune, size = self.tune, self.tune.batch_size // progress.split
        rounds = tune.accumulation * progress.split
        total = size * rounds * data_parallel.world_size()
        positions = range(progress.done * total, (progress.done + 1) * total)
        step = self.train_set.step(positions, tune.seed, self.objective.base.device)
        for i in range(rounds):
            yield step.batch((i * data_parallel.world_size() + data_parallel.rank()) * size, size)

    def _halve(self, progress: Progress, console: Console) -> None:
        size = self.tune.batch_size
        if progress.split > 1 or size % (2 * self.train_set.images_per_prompt):
            raise TrainingError(self._no_memory_message(progress))
        progress.split = 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print(
            f"step {progress.done}: out of memory. From here on micro batches of {size // 2} instead of {size}, "
            f"{self.tune.accumulation * 2} instead of {self.tune.accumulation} a step: the same gradient, more slowly",
            highlight=False,
        )

    def _no_memory_message(self, progress: Progress) -> str:
        return (
            f"Step {progress.done}: no memory for a micro batch of {self.tune.batch_size // progress.split}. Lower "
            "train.batch_size and raise train.accumulation by the same factor, set train.decode_size, or "
            "train.gradient_checkpointing: true"
        )

    def _nonfinite_message(self, progress: Progress) -> str:
        own = {name for batch in self._batches(progress) for name in self.objective.find_nonfinite_rewards(batch, self.tuned)}
        found = {name: float(name in own) for name in sorted(self.objective.mix.rewards)}
        broken = [name for name, share in data_parallel.mean_over_ranks(found, self.objective.base.device).items() if share]
        whose = f"of reward {', '.join(broken)}" if broken else "of the chain (every reward's own is finite)"
        return (
            f"Step {progress.done}: the gradient {whose} is not finite; nothing was updated, and the state before it is "
            "kept. Lower train.learning_rate, train.grad_steps or that reward's weight"
        )

    def _grid(self, folder: Path, step: int, rows: tuple[Sequence[str], Tensor]) -> None:
        if data_parallel.rank() > 0 and not self.objective.unet_is_sharded:
            return
        prompts, prefix = rows
        images = pictures.to_bytes(self.objective.sampler.generate(prompts, [], self.tuned, prefix))
        if data_parallel.rank() > 0:
            return
        with written_aside(folder / "grids" / f"step_{step:06d}.png") as aside:
            pictures.save(pictures.side_by_side(prompts, {f"step {step}": list(map(pictures.picture, images))}), aside)

    def _print_run_summary(self, console: Console, progress: Progress) -> None:
        """The derived numbers, before the work starts."""
        tune, sampler, workers = self.tune, self.objective.sampler, data_parallel.world_size()
        trainable = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        size, rounds = tune.batch_size // progress.split, tune.accumulation * progress.split
        spread = f" x {workers} processes" if workers > 1 else ""
        if tune.shard:
            split = (
                f"the UNet is split over {workers} processes"
                if self.objective.unet_is_sharded
                else "one process: nothing to split"
            )
            console.print(f"shard: {split}", highlight=False)
        variant = "" if tune.gradient == "truncated" else f" ({tune.gradient})"
        console.print(
            f"{trainable:,} trainable parameters · {len(self.train_set.prompts):,} prompts · {tune.steps} steps of "
            f"{size} x {rounds}{spread} = {size * rounds * workers} samples · gradient through {tune.grad_steps} of "
            f"{sampler.num_inference_steps} denoising steps{variant}"
            + (f" · resumed after step {progress.done}" if progress.done else ""),
            highlight=False,
        )


def adamw(module: nn.Module, tune: TuneConfig, negative_learning_rate: float) -> torch.optim.AdamW:
    """The optimiser of what is trained in a module, in its order; a negative embedding has a rate of its own."""
    negative = {id(p) for m in module.modules() if isinstance(m, NegativeEmbedding) for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in negative], "lr": tune.learning_rate},
        {"params": [p for p in trained if id(p) in negative], "lr": negative_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=tune.weight_decay)


def rate_factor(tune: TuneConfig, step: int) -> float:
    """What the learning rate is multiplied by at step index `step`: warm-up from 0, then the decay to 0."""
    warm = min(1.0, (step + 1) / max(1, tune.warmup_steps))
    left = 1 - max(0, step - tune.warmup_steps) / max(1, tune.steps - tune.warmup_steps)
    decay = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return warm * decay[tune.decay]


def _line(record: dict[str, Any], steps: int, seconds: float) -> str:
    values = " ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
    return f"step {record['step']}/{steps}  {values}  {seconds:.1f} s/step"
