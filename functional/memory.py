"""Smaller batches for a measure that runs out of memory."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


@dataclass
class _Limit:
    """How many images fit into memory at once; None if it never ran out."""

    name: str
    count: int | None = None
    is_announced: bool = True

    def attempt(self, run: Callable[[int], Result], wanted: int) -> Result:
        """Calls `run` with a number of images, at most `wanted`, until they fit into memory."""
        while True:
            count = min(wanted, self.count or wanted)
            try:
                result = run(count)
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                # A pass inside may have halved it further.
                self.count = math.ceil(min(count, self.count or count) / 2)
                self.is_announced = False
            else:
                self._announce()
                return result
            # The error has held what the failed pass had in memory until here.
            from lightning.pytorch.utilities.memory import garbage_collection_cuda

            garbage_collection_cuda()

    def _announce(self) -> None:
        if not self.is_announced:
            warnings.warn(
                f"{self.name} ran out of memory and goes on with batches of {self.count}; values "
                "change by rounding only.",
                stacklevel=2,
            )
        self.is_announced = True


_LIMIT: ContextVar[_Limit | None] = ContextVar("_LIMIT", default=None)


@contextmanager
def smaller_batches(name: str) -> Iterator[None]:
    """Lets a measure halve its batches if memory runs out; an outer name stays."""
    token = _LIMIT.set(_LIMIT.get() or _Limit(name))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def fitting(run: Callable[..., Result], *batch: Any) -> Iterator[Result]:
    """Results of `run` for parts of a batch, which together are the batch.

    There is one part unless memory runs out inside `smaller_batches`: then the part that failed is
    tried again in two, and later ones are as small.

    Args:
        run: Called with a part of each of `batch`, and perhaps again with less of it.
        batch: Sequences or tensors, such as images and labels, with one entry for each example.

    Raises:
        RuntimeError: The original error, if a single example does not fit.

    Example:
        >>> list(fitting(lambda images, labels: (images, labels), [1, 2], [3, 4]))
        [([1, 2], [3, 4])]
    """
    limit, begin, count = _LIMIT.get(), 0, len(batch[0])
    if limit is None:
        yield run(*batch)
        return
    while begin < count:

        def attempt(size: int, begin: int = begin) -> tuple[int, Result]:
            return begin + size, run(*(part[begin : begin + size] for part in batch))

        begin, result = limit.attempt(attempt, count - begin)
        yield result


def retried(run: Callable[[], Result], count: int) -> Result:
    """Calls a function of a batch that cannot be cut until its passes, in pieces, fit into memory.

    The function calls the network through `in_pieces`.
    """
    limit = _LIMIT.get()
    return run() if limit is None else limit.attempt(lambda _: run(), count)


def in_pieces(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The output of a network for a batch, piece by piece if memory ran out before.

    With gradients each piece is computed again in the backward pass, so that memory holds the graph
    of one piece at a time.
    """
    limit, count = _LIMIT.get(), len(inputs)
    if limit is None or count == 0:
        return network(inputs)
    if not torch.is_grad_enabled():
        outputs = list(fitting(network, inputs))
    elif limit.count is None or count <= limit.count:
        return network(inputs)
    else:
        pieces = inputs.split(limit.count)
        outputs = [checkpoint(network, piece, use_reentrant=False) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device, or a library on it, has too little memory."""
    # Imported late: it takes seconds, and functions work without Lightning until then.
    from lightning.pytorch.utilities.memory import is_oom_error

    no_workspace = "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    on_mps = "MPS backend out of memory" in str(error)
    return (
        isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or no_workspace or on_mps
    )
