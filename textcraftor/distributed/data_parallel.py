"""Data parallel training under `torchrun` or `accelerate launch`: each process takes its share of every step's batch.

The gradient of N processes is that of one with N times the micro batch. Each process holds the whole module, sums its
gradient over its micro batches, and the mean over the processes is taken once a step.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> torch.device:
    """Join the other processes where a launcher started several; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def finish() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes what there is to write."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        dist.barrier()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors by their means over the processes, in one message for each dtype."""
    if processes() == 1:
        return
    groups = dict[torch.dtype, list[Tensor]]()
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= processes()
        for tensor, mean in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_of(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over the processes, which name the same ones."""
    if processes() == 1:
        return values
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    average([means])
    return dict(zip(values, means.tolist(), strict=True))


def worst(status: int, device: torch.device) -> int:
    """The greatest status of all processes."""
    if processes() == 1:
        return status
    value = torch.tensor([status], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())
