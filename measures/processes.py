"""How several processes measure one set."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from robust_flatness.functional.worst_case_flatness import Sharing

Result = TypeVar("Result")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Examples:
    """The images that a measure looks at: a whole set, or the share of one process.

    Attributes:
        images: `(N, C, H, W)`, floating point, in [0, 1].
        labels: Class indices `(N,)`.
        indices: Global index of each image in the measured set. A share consists of whole chunks
            by global index.
        progress: Called after each attack on each batch.
        sharing: How other processes take part in a perturbation that all images share; None if
            there are no others.
    """

    images: Tensor
    labels: Tensor
    indices: Sequence[int]
    progress: Callable[[], None] = _nothing
    sharing: Sharing | None = None

    def __len__(self) -> int:
        return len(self.labels)


@contextmanager
def no_progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows nothing."""
    yield _nothing


@dataclass(frozen=True)
class Processes:
    """The processes that share out a measured set, all of which hold its images.

    The set is cut into chunks by global index, which are dealt out in turn. A chunk is the same
    batch for any number of processes, and no image is counted twice.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Device of the network; None leaves the images where they are.
        progress: Opens a progress bar with a text and a total, and gives the function that
            advances it.

    Example:
        >>> Processes(0, 2).indices(5, chunk=2), Processes(1, 2).indices(5, chunk=2)
        ([0, 1, 4], [2, 3])
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]] = no_progress

    def indices(self, count: int, chunk: int) -> list[int]:
        """Global indices of the images of this process."""
        starts = range(self.rank * chunk, count, self.size * chunk)
        return [index for start in starts for index in range(start, min(start + chunk, count))]

    def moved(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device of the network."""
        return [tensor if self.device is None else tensor.to(self.device) for tensor in tensors]

    def share_out(
        self,
        measure: Callable[[Examples], Result],
        examples: Examples,
        *,
        chunk: int,
        text: str,
        attacks: int,
        common_fields: Sequence[str] = (),
    ) -> Result:
        """Measures each image on one process and gives the whole result to all.

        Every process fills its columns of a table of zeros and the tables are added, which is
        exact. What is averaged afterwards is averaged in one order on any number of processes.

        Args:
            measure: Maps the share of a process to a dataclass, whose tensors hold one value for
                each image along their last dimension.
            examples: The whole set.
            chunk: Number of images in a chunk.
            text: Text of the progress bar.
            attacks: How often `measure` reports progress for each chunk.
            common_fields: Fields of the dataclass that are the same on all processes.

        Returns:
            The dataclass for the whole set, with tensors in float64, or bool, on the CPU.
        """
        count, mine = len(examples), self.indices(len(examples), chunk)
        sharing = None
        if self.size > 1:
            sharing = Sharing(math.ceil(count / (chunk * self.size)), self._gather)
        with self.progress(text, math.ceil(len(mine) / chunk) * attacks) as advance:
            images, labels = self.moved(examples.images[mine], examples.labels[mine])
            result = measure(Examples(images, labels, mine, advance, sharing))
        whole = {}
        for name, value in _fields(result).items():
            if isinstance(value, Tensor) and name not in common_fields:
                table = value.new_zeros(*value.shape[:-1], count, dtype=torch.float64)
                table[..., mine] = value.to(table)
                if self.size > 1:
                    distributed.all_reduce(table)
                whole[name] = table.cpu().bool() if value.dtype == torch.bool else table.cpu()
        return dataclasses.replace(result, **whole)  # type: ignore[type-var]

    def broadcast(self, value: Any) -> None:
        """Writes the first process's tensors into those of a container, in place."""
        for tensor in _tensors(value) if self.size > 1 else ():
            distributed.broadcast(tensor, src=0)

    def agree(self, result: Result) -> Result:
        """Gives all processes the numbers and tensors of the first one's result, a dataclass."""
        if self.size == 1:
            return result
        self.broadcast(_fields(result))
        numbers = {name: v for name, v in _fields(result).items() if isinstance(v, (int, float))}
        received: list[Any] = [numbers]
        distributed.broadcast_object_list(received, src=0)
        return dataclasses.replace(result, **received[0])  # type: ignore[type-var]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(tensors, tensor)
        return tensors


def _fields(result: Any) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
