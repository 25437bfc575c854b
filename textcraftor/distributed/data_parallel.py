"""Data parallel training under `torchrun` or `accelerate launch`: each rank takes its share of every step's batch.

Each rank holds the whole module and sums its gradient over its micro batches; once a step the gradients are averaged
over the ranks. The result is the gradient of one process with world size times the micro batch.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def start(device: torch.device) -> torch.device:
    """Join the process group if a launcher started several processes; returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        return device
    local_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local_device)
    return local_device


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank. Rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if world_size() > 1:
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """The value of each rank, in order of rank. `value` is a small picklable object."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors in place by their means over the ranks, one message for each dtype."""
    if world_size() == 1:
        return
    groups = dict[torch.dtype, list[Tensor]]()
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean of each value over the ranks. All ranks pass the same keys."""
    if world_size() == 1:
        return values
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    all_reduce_mean([means])
    return dict(zip(values, means.tolist(), strict=True))


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest value of all ranks."""
    if world_size() == 1:
        return value
    largest = torch.tensor([value], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())
