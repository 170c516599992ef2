"""What the datamodules read images from: labelled images in a fixed order, a batch at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images `(N, C, H, W)` and their labels `(N,)`, int64."""


class LabelledImages(Dataset[tuple[Tensor, int]], ABC):
    """Images of 8 bits with labels, known by their position, 0 to `len(images) - 1`.

    A `torch.utils.data.DataLoader` asks `__getitems__` for a whole batch; together with
    `keep_batch` as `collate_fn` no image is ever handled on its own.

    Attributes:
        labels: the labels of all images `(N,)`, int64.
    """

    labels: Tensor

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image `(C, H, W)`, uint8, and its label."""
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the images `(N, C, H, W)`, uint8, at `indices`, and their labels `(N,)`."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> "LabelledImages":
        """Return the images at `indices`, in their order, as a set of its own."""


def keep_batch(batch: Any) -> Any:
    """Return `batch` as it is: a `collate_fn` for datasets that answer with whole batches."""
    return batch


def to_unit_range(images: Tensor) -> Tensor:
    """Turn pixels of 8 bits into float32 in [0, 1].

    Args:
        images: uint8 of any shape.

    Returns:
        `images / 255`.

    Example:
        >>> import torch
        >>> to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float().div_(255)
