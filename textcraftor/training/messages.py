"""What a training run prints and says when it stops."""

from typing import Any

from torch import nn

from textcraftor.config import TuneConfig

LOWER_BATCH = "lower train.batch_size and raise train.accumulation by the same factor"


def run_summary(
    tune: TuneConfig, module: nn.Module, prompts: int, chain_steps: int, micro_batch: tuple[int, int], world_size: int
) -> str:
    """The derived numbers, printed before the work starts. micro_batch: (size, number of them in a step on each rank)."""
    size, rounds = micro_batch
    processes = f" x {world_size} processes" if world_size > 1 else ""
    variant = "" if tune.gradient == "truncated" else f" ({tune.gradient})"
    return (
        f"{trainable(module):,} trainable parameters · {prompts:,} prompts · {tune.steps} steps of "
        f"{size} x {rounds}{processes} = {size * rounds * world_size} samples · gradient through {tune.grad_steps} of "
        f"{chain_steps} denoising steps{variant}"
    )


def step_line(record: dict[str, Any], steps: int, seconds: float) -> str:
    """One line of progress. record: a row of the history."""
    values = " ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
    return f"step {record['step']}/{steps}  {values}  {seconds:.1f} s/step"


def no_memory_to_start(module: nn.Module) -> str:
    """The optimiser's state does not fit."""
    return (
        f"No memory for the optimiser's state of {trainable(module):,} parameters. Set train.method: lora, or split the UNet "
        "over several GPUs with train.shard: true. Nothing was lost"
    )


def no_memory_for_batch(step: int, size: int) -> str:
    """A micro batch does not fit."""
    return (
        f"Step {step}: no memory for a micro batch of {size}. {LOWER_BATCH.capitalize()}, set train.decode_size, or "
        "train.gradient_checkpointing: true. The run resumes from its checkpoint"
    )


def no_memory_for_update(step: int, module: nn.Module, saved_step: int) -> str:
    """The optimiser's step does not fit; it may have changed some of the weights."""
    resumes = f"resumes after step {saved_step}" if saved_step else "starts at step 0"
    return (
        f"Step {step}: no memory for the optimiser's update of {trainable(module):,} parameters. Free memory on the device, or "
        f"{LOWER_BATCH}. The same command {resumes}"
    )


def no_memory_for_grid(step: int) -> str:
    """The sample grid does not fit."""
    return (
        f"Step {step}: no memory for the sample grid. Set base.vae_slicing: true, or raise train.grid_every. The run resumes "
        "from its checkpoint"
    )


def nonfinite_gradient(step: int, rewards: list[str]) -> str:
    """rewards: those that are not finite, or whose gradient to the image is not; none if the chain's gradient is not."""
    whose = f"of reward {', '.join(rewards)}" if rewards else "of the chain (every reward's own is finite)"
    return (
        f"Step {step}: the gradient {whose} is not finite; nothing was updated, and the state before it is kept. Lower "
        "train.learning_rate, train.grad_steps or that reward's weight, which begins a new run at step 0"
    )


def trainable(module: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
