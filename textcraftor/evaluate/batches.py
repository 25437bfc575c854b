"""The rows of an evaluation in batches, which the processes of `torchrun` divide among them.

The batches are those of one process, so that each image and each score has the same bytes however many there are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from textcraftor.distributed.work_split import WorkSplit

console = Console(stderr=True)


@dataclass(frozen=True)
class Batches:
    """Rows 0..length-1, `size` at a time, in turn to each process."""

    length: int
    size: int
    work: WorkSplit = field(default_factory=WorkSplit)

    @property
    def all(self) -> list[slice]:
        """Every batch, in order."""
        return [slice(start, min(start + self.size, self.length)) for start in range(0, self.length, self.size)]

    def compute(self, values: Callable[[slice], Tensor], description: str) -> Tensor:
        """(length, ...) on the CPU: values(rows) of this process's batches, 0 in the other rows."""
        table: Tensor | None = None
        shown = Console(quiet=True) if self.work.rank else console
        for rows in track(self.work.items_of_rank(self.all), description, console=shown, transient=True):
            found = values(rows).cpu()
            if table is None:
                table = found.new_zeros((self.length, *found.shape[1:]))  # untouched rows take no memory
            table[rows] = found
        if table is None:  # more processes than batches: with nothing to do, it still has to know the shape
            found = values(self.all[0])
            table = torch.zeros((self.length, *found.shape[1:]), dtype=found.dtype)
        return table

    @torch.inference_mode()  # in which some tables were made, and outside of which those cannot be written to
    def collect(self, table: Tensor) -> Tensor:
        """On the first process: the table with every process's rows. The others, which must ask too, keep their own."""
        if self.work.world_size == 1:
            return table
        for rows in self.all:
            # As bytes: of each row all but one process have 0, and the greatest of each byte is that one's, bit for bit.
            part = self.work.all_reduce_max(table[rows].contiguous().flatten().view(torch.uint8).clone())
            if self.work.rank == 0:
                table[rows] = part.view(table.dtype).view_as(table[rows])
        return table
