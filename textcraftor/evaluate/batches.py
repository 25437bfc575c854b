"""Batches of an evaluation's rows, divided among the processes of `torchrun`.

The batches do not depend on the world size, so every image and score has the same bytes for any number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor

from textcraftor.distributed.work_split import WorkSplit
from textcraftor.progress import counted

console = Console(stderr=True)


@dataclass(frozen=True)
class Batches:
    """Rows 0..length-1 in batches of `size`, dealt to the processes in turn."""

    length: int
    size: int
    work: WorkSplit = field(default_factory=WorkSplit)

    @property
    def all(self) -> list[slice]:
        """Every batch, in order."""
        return [slice(start, min(start + self.size, self.length)) for start in range(0, self.length, self.size)]

    def compute(self, values: Callable[[slice], Tensor], description: str) -> Tensor:
        """(length, ...) on the CPU: `values(rows)` for this process's batches, 0 in the other rows."""
        table: Tensor | None = None
        for rows in counted(self.work.items_of_rank(self.all), description, quiet=self.work.rank > 0):
            batch = values(rows).cpu()
            if table is None:
                table = batch.new_zeros((self.length, *batch.shape[1:]))  # zero pages take no memory until written
            table[rows] = batch
        if table is None:  # more processes than batches: this one has none, but needs the shape
            batch = values(self.all[0])
            table = torch.zeros((self.length, *batch.shape[1:]), dtype=batch.dtype)
        return table

    @torch.inference_mode()  # tables made in inference mode can only be written to in it
    def collect(self, table: Tensor) -> Tensor:
        """Gather the rows of all processes on rank 0. Every rank must call this; the others get their own table back."""
        if self.work.world_size == 1:
            return table
        for rows in self.all:
            # Reduced by the maximum of each byte: all processes but one have 0 there, so the bits arrive unchanged.
            part = self.work.all_reduce_max(table[rows].contiguous().flatten().view(torch.uint8).clone())
            if self.work.rank == 0:
                table[rows] = part.view(table.dtype).view_as(table[rows])
        return table
