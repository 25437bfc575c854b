"""Work that several processes divide among them and that takes hours: `prepare` under `torchrun`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from textcraftor.distributed import data_parallel

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long one process waits for the others. A dead one is noticed at once: its connection closes."""


class Shares:
    """This process's share of the work. Without a launcher there is one process, and its share is everything."""

    def __init__(self) -> None:
        self.rank, self.processes = data_parallel.rank(), data_parallel.processes()
        # A group of its own: the default one gives up after minutes, and NCCL's would busy the GPU with waiting.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)) if self.processes > 1 else None

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Every n-th of the items, n processes taking turns."""
        return items[self.rank :: self.processes]

    def pooled(self, table: Tensor) -> Tensor:
        """The greatest of each entry over the processes, where a process leaves 0 what it doesn't know. Everyone waits."""
        if self._group is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        return table

    def wait(self) -> None:
        """Until every process is here."""
        self.pooled(torch.zeros(1, dtype=torch.uint8))
