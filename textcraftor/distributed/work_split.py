"""Independent work items divided among the ranks, for jobs of hours: `prepare` and `evaluate` under `torchrun`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from textcraftor.distributed import data_parallel

T = TypeVar("T")

TIMEOUT = timedelta(days=30)
"""How long a rank waits for the others. A dead rank is noticed at once: its connection closes."""


class WorkSplit:
    """Divides items among the ranks. Without a launcher there is one rank, which gets all of them."""

    def __init__(self) -> None:
        self.rank, self.world_size = data_parallel.rank(), data_parallel.world_size()
        # A separate gloo group: the default group times out after minutes, and NCCL keeps the GPU busy while waiting.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=TIMEOUT)) if self.world_size > 1 else None

    def items_of_rank(self, items: Sequence[T]) -> Sequence[T]:
        """Every n-th item, beginning with this rank's number; n is the world size."""
        return items[self.rank :: self.world_size]

    def all_reduce_max(self, table: Tensor) -> Tensor:
        """The largest value of each entry over the ranks, in place. Collective. Unknown entries are 0."""
        if self._group is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        return table

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.all_reduce_max(torch.zeros(1, dtype=torch.uint8))
