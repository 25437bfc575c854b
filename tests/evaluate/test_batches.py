"""Rank 0 ends with every row, bit for bit, for any number of processes."""

import pytest
import torch

from tests.processes import in_processes
from textcraftor.distributed import data_parallel
from textcraftor.evaluate.batches import Batches

VALUES = torch.tensor([[-1.5, 2.0], [0.0, -0.0], [1e-300, -1e300], [3.0, float("inf")], [0.1, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("values", [VALUES, VALUES[:, 0], VALUES.float(), (VALUES * 10).to(torch.uint8)])
def test_rank_0_gathers_the_rows_of_both_processes(size: int, values: torch.Tensor) -> None:
    def work() -> None:
        asked = []

        def compute(rows: slice) -> torch.Tensor:
            asked.append(rows)
            return values[rows]

        batches = Batches(5, size)
        table = batches.compute(compute, "")
        mine = batches.all[data_parallel.rank() :: 2]
        assert asked == (mine or batches.all[:1])
        assert all(same_bits(table[rows], values[rows]) for rows in mine)
        whole = batches.collect(table)
        assert data_parallel.rank() == 1 or same_bits(whole, values)

    in_processes(2, work)


def test_one_process_computes_every_batch() -> None:
    batches = Batches(5, 2)
    assert batches.all == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert same_bits(batches.collect(batches.compute(lambda rows: VALUES[rows], "")), VALUES)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
