"""Prompt-based fine-tuning (paper section 3.2.2, algorithm 1): the gradient of rewards, through denoising steps, into
the tuned modules (text encoder, negative embedding, or in a second stage the UNet on the frozen tuned encoder).

The training loop and its safeguards; loss and gradient are in `objective.py`. Differences from the published code:
docs/decisions/published-code.md.
"""

import contextlib
import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from textcraftor import pictures
from textcraftor.artifact import written_aside
from textcraftor.config import TuneConfig
from textcraftor.device import is_out_of_memory
from textcraftor.distributed import data_parallel
from textcraftor.distributed.fsdp import full_tensor, is_sharded
from textcraftor.errors import Preempted, RankFailure, TrainingError
from textcraftor.models.base import TunedModel
from textcraftor.progress import Counter
from textcraftor.training import messages
from textcraftor.training.checkpoint import FILE_NAME, Checkpoint, Progress
from textcraftor.training.data import Batch, TrainSet
from textcraftor.training.ema import MovingAverage
from textcraftor.training.objective import Objective
from textcraftor.training.optimizer import adamw, allocate_moments, rate_factor
from textcraftor.training.preemption import StopRequest, catch_sigterm
from textcraftor.training.resume import execution_facts

SUCCEEDED, STOP_REQUESTED, OUT_OF_MEMORY, FAILED = range(4)
"""Outcome of a rank's backward passes, in order of severity: the ranks act on the most severe one."""


@dataclass
class Trainer:
    """One training run: the loop, its safeguards and its history."""

    objective: Objective
    train_set: TrainSet
    tuned: TunedModel
    module: nn.Module  # holds every trained parameter of `tuned`
    negative_learning_rate: float = 5e-3  # of a negative embedding, if one is trained

    @property
    def tune(self) -> TuneConfig:
        """The settings, shared with the objective."""
        return self.objective.tune

    def fit(self, folder: Path, facts: Mapping[str, Any], preview: tuple[Sequence[str], Tensor]) -> Progress:
        """Run, or resume, to the last step. The module ends with the final weights: the moving average, if there is one.

        folder: for the checkpoint and the sample grids.  facts: what determines the result; see `Checkpoint`.
        preview: prompts of the sample grids and their latents at the switch.
        Raises TrainingError on every rank: before the optimiser's step if a loss or gradient is not finite, or memory
        does not suffice even for half the micro batch (a checkpoint is written first); in the optimiser's step if memory
        does not suffice there (the last checkpoint is kept); if a checkpoint cannot be read or written.
        Raises Preempted after SIGTERM, with a checkpoint. Raises RankFailure if a rank lacks memory inside a sharded UNet,
        where the others wait for it; the last checkpoint is kept.
        """
        tune, console = self.tune, Console(stderr=True, quiet=data_parallel.rank() > 0)
        checkpoint = Checkpoint(folder / FILE_NAME, facts)
        saved = checkpoint.read()
        progress = saved.progress if saved else Progress()
        with self._memory_check(messages.no_memory_to_start(self.module)):
            optimizer = adamw(self.module, tune, self.negative_learning_rate)
            rates = [group["lr"] for group in optimizer.param_groups]
            average = MovingAverage(self.module, tune.ema_decay, tune.interpolation)
            if saved:
                saved.load_into(self.module, optimizer, average.weights)
            else:
                allocate_moments(optimizer)
        del saved
        self._resume_execution(progress, console)
        self._print_run_summary(console, progress)
        saved_step = progress.done

        def save() -> float:
            nonlocal saved_step
            checkpoint.save(progress, self.module, optimizer, average.weights)
            saved_step = progress.done
            return time.monotonic()

        if progress.done == 0:
            self._grid(folder, 0, preview)
        with Counter("step", tune.steps, done=progress.done, console=console) as counter, catch_sigterm() as stop:
            saved_at = time.monotonic()
            while progress.done < tune.steps:
                started, step = time.monotonic(), progress.done
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * rate_factor(tune, step)
                try:
                    record = self._gradient(optimizer, progress, stop, console)
                except (TrainingError, Preempted):
                    save()
                    raise
                with self._memory_check(messages.no_memory_for_update(step, self.module, saved_step)):
                    optimizer.step()
                progress.done += 1
                average.update(progress.done)
                progress.history.append({"step": progress.done, **record})
                if progress.done % max(1, tune.steps // 15) == 0:
                    line = messages.step_line(progress.history[-1], tune.steps, time.monotonic() - started)
                    console.print(line, highlight=False, soft_wrap=True)
                last = progress.done == tune.steps
                if last or progress.done % tune.grid_every == 0:
                    try:
                        with average.applied():
                            self._grid(folder, progress.done, preview)
                    except TrainingError:
                        save()
                        raise
                if last or self._checkpoint_is_due(saved_at) or progress.done % tune.checkpoint_every == 0:
                    saved_at = save()
                counter.advance()
        average.copy_to_module()
        data_parallel.barrier()
        return progress

    def _gradient(
        self, optimizer: torch.optim.Optimizer, progress: Progress, stop: StopRequest, console: Console
    ) -> dict[str, float]:
        """The clipped gradient of one optimiser step, averaged over the ranks. After a lack of memory the step is tried
        once more with half the micro batch and twice the accumulation."""
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
            self._halve_micro_batch(progress, console)
        # Gradients of sharded parameters are averaged already.
        data_parallel.all_reduce_mean(
            [p.grad for p in self.module.parameters() if p.grad is not None and not is_sharded(p.grad)]
        )
        record = data_parallel.mean_over_ranks(record, self.objective.base.device)
        clipped = [torch.nn.utils.clip_grad_norm_(group["params"], self.tune.max_grad_norm) for group in optimizer.param_groups]
        norms = [float(full_tensor(norm)) for norm in clipped]
        if not all(map(math.isfinite, [*norms, *record.values()])):
            raise TrainingError(messages.nonfinite_gradient(progress.done, self._nonfinite_rewards(progress)))
        return {**record, "grad_norm": math.hypot(*norms)}

    def _accumulate_gradients(self, progress: Progress, stop: StopRequest) -> tuple[dict[str, float], int, Exception | None]:
        """Add up one step's gradient over this rank's micro batches; returns (mean loss and rewards, outcome, error)."""
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
            if self.objective.unet_is_sharded:  # the others wait for this rank inside the UNet and cannot be told
                raise RankFailure(messages.no_memory_for_batch(progress.done, self._micro_batch(progress)[0])) from error
            return {}, OUT_OF_MEMORY, None

    def _stop_requested(self, stop: StopRequest) -> bool:
        """Whether SIGTERM has come. With a sharded UNet: to any rank, because all must stop at the same micro batch."""
        if not self.objective.unet_is_sharded:
            return stop.requested
        return bool(data_parallel.max_over_ranks(int(stop.requested), self.objective.base.device))

    def _checkpoint_is_due(self, saved_at: float) -> bool:
        """Whether the last checkpoint is older than `checkpoint_minutes` by any rank's clock."""
        minutes = self.tune.checkpoint_minutes
        return minutes is not None and bool(
            data_parallel.max_over_ranks(int(time.monotonic() - saved_at > 60 * minutes), self.objective.base.device)
        )

    def _batches(self, progress: Progress) -> Iterator[Batch]:
        """This rank's micro batches of the step. Together, the ranks take consecutive samples of the stream."""
        size, rounds = self._micro_batch(progress)
        total = size * rounds * data_parallel.world_size()
        positions = range(progress.done * total, (progress.done + 1) * total)
        step = self.train_set.step(positions, self.tune.seed, self.objective.base.device)
        for i in range(rounds):
            yield step.batch((i * data_parallel.world_size() + data_parallel.rank()) * size, size)

    def _micro_batch(self, progress: Progress) -> tuple[int, int]:
        """(samples of a micro batch, micro batches of this rank in a step)."""
        return self.tune.batch_size // progress.split, self.tune.accumulation * progress.split

    def _halve_micro_batch(self, progress: Progress, console: Console) -> None:
        size = self.tune.batch_size
        if progress.split > 1 or size % (2 * self.train_set.images_per_prompt):
            raise TrainingError(messages.no_memory_for_batch(progress.done, self._micro_batch(progress)[0]))
        progress.split = 2
        progress.record_execution(execution_facts(self.tune, progress.split, self.objective.base.device))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print(
            f"step {progress.done}: out of memory. From here on micro batches of {size // 2} instead of {size}, "
            f"{self.tune.accumulation * 2} instead of {self.tune.accumulation} a step: the same gradient, more slowly",
            highlight=False,
        )

    def _resume_execution(self, progress: Progress, console: Console) -> None:
        """Adopt what may differ between the sittings of a run, and say what does."""
        if progress.split > 1 and progress.execution[-1]["batch_size"] * progress.split != self.tune.batch_size:
            progress.split = 1  # another batch size was chosen meanwhile
        changes = progress.record_execution(execution_facts(self.tune, progress.split, self.objective.base.device))
        if changes:
            console.print(
                f"From step {progress.done} on: {', '.join(changes)}. The result is the same up to rounding", highlight=False
            )

    @contextlib.contextmanager
    def _memory_check(self, message: str, collective: bool = False) -> Iterator[None]:
        """Turn a lack of memory on any rank into a TrainingError on every rank.

        collective: whether the block waits for the other ranks. A rank that fails there cannot tell them: RankFailure.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if collective:
                raise RankFailure(message) from error
            failure = error
        if data_parallel.max_over_ranks(int(failure is not None), self.objective.base.device):
            raise TrainingError(message) from failure

    def _nonfinite_rewards(self, progress: Progress) -> list[str]:
        """Rewards that are not finite in a micro batch of any rank."""
        broken = {
            name for batch in self._batches(progress) for name in self.objective.find_nonfinite_rewards(batch, self.tuned)
        }
        found = {name: float(name in broken) for name in sorted(self.objective.mix.rewards)}
        return [name for name, share in data_parallel.mean_over_ranks(found, self.objective.base.device).items() if share]

    def _grid(self, folder: Path, step: int, preview: tuple[Sequence[str], Tensor]) -> None:
        """Draw the preview prompts with the current weights. Collective. Raises TrainingError for lack of memory."""
        with self._memory_check(messages.no_memory_for_grid(step), self.objective.unet_is_sharded):
            self._draw_grid(folder, step, preview)

    def _draw_grid(self, folder: Path, step: int, preview: tuple[Sequence[str], Tensor]) -> None:
        if data_parallel.rank() > 0 and not self.objective.unet_is_sharded:
            return
        prompts, prefix = preview
        images = pictures.to_bytes(self.objective.sampler.generate(prompts, [], self.tuned, prefix))
        if data_parallel.rank() > 0:
            return
        with written_aside(folder / "grids" / f"step_{step:06d}.png") as aside:
            pictures.save(pictures.side_by_side(prompts, {f"step {step}": list(map(pictures.picture, images))}), aside)

    def _print_run_summary(self, console: Console, progress: Progress) -> None:
        tune, ranks = self.tune, data_parallel.world_size()
        if tune.shard:
            split = (
                f"the UNet is split over {ranks} processes"
                if self.objective.unet_is_sharded
                else "one process: nothing to split"
            )
            console.print(f"shard: {split}", highlight=False)
        micro_batch, steps = self._micro_batch(progress), self.objective.sampler.num_inference_steps
        summary = messages.run_summary(tune, self.module, len(self.train_set.prompts), steps, micro_batch, ranks)
        resumed = f" · resumed after step {progress.done}" if progress.done else ""
        console.print(summary + resumed, highlight=False, soft_wrap=True)
