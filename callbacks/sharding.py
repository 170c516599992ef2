"""One measured set on many processes: whole chunks of it for each rank."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def indices_of_rank(count: int, chunk: int, rank: int, world_size: int) -> list[int]:
    """Global indices of the examples that a rank measures.

    The set is cut into chunks by global index, dealt out in turn, so that a chunk is the same
    batch however many ranks there are, and no example is counted twice.

    Args:
        count: Size of the measured set.
        chunk: Examples in a chunk.
        rank: This process.
        world_size: Number of processes.

    Example:
        >>> indices_of_rank(5, 2, 0, 2), indices_of_rank(5, 2, 1, 2)
        ([0, 1, 4], [2, 3])
    """
    starts = range(rank * chunk, count, world_size * chunk)
    return [index for start in starts for index in range(start, min(start + chunk, count))]


def measure_sharded(
    trainer: Trainer,
    count: int,
    chunk: int,
    measure: Callable[[list[int]], Tensor],
    device: torch.device,
) -> Tensor:
    """Measures a set on all ranks and gives every rank every example's values.

    Each rank fills its columns of a table of zeros and the tables are summed, which is exact; so
    whatever is averaged afterwards is averaged in one order, on any number of processes.

    Args:
        trainer: The trainer.
        count: Size of the measured set.
        chunk: Examples in a chunk.
        measure: Maps global indices to values `(rows, len(indices))`.
        device: Where ranks exchange.

    Returns:
        `(rows, count)`, float64, on the CPU.
    """
    mine = indices_of_rank(count, chunk, trainer.global_rank, trainer.world_size)
    values = measure(mine)
    table = torch.zeros(len(values), count, dtype=torch.float64, device=device)
    table[:, mine] = values.to(table)
    if trainer.world_size > 1:
        table = trainer.strategy.reduce(table, reduce_op="sum")
    return table.cpu()
