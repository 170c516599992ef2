"""Labeled images of 8 bits per channel, by position: what the datamodules read and keep."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images `(N, C, H, W)` and their labels `(N,)`, int64."""


class LabeledImages(Dataset[tuple[Tensor, int]], ABC):
    """Base class of data sets of uint8 images with labels, in a fixed order.

    A `DataLoader` asks `__getitems__` for whole batches, so that no image is handled on its own;
    its `collate_fn` is `torch.utils.data.default_convert`, which leaves batches as they are.

    Attributes:
        labels: Labels of all images `(N,)`, int64.
    """

    labels: Tensor

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns one image `(C, H, W)`, uint8, and its label."""
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns the images `(N, C, H, W)`, uint8, at `indices`, and their labels `(N,)`."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> "LabeledImages":
        """Returns the images at `indices`, in their order."""


class ResidentImages(LabeledImages):
    """Images in memory as one uint8 tensor, on any device.

    CIFAR-10's training images take 150 MB. Batches are indexed on the device of the tensor, so that
    nothing is decoded, collated or copied from the host during training.

    Args:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`, integers.

    Raises:
        ValueError: If a type or shape is another one.

    Example:
        >>> images = ResidentImages(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
        >>> pixels, labels = images.__getitems__([3, 1])
        >>> pixels.shape, labels.tolist()
        (torch.Size([2, 1, 2, 2]), [3, 1])
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                "Expected `images` of shape (N, C, H, W) and type torch.uint8"
                f" but got {tuple(images.shape)} and {images.dtype}."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"Expected `labels` to be {len(images)} integers"
                f" but got shape {tuple(labels.shape)} and {labels.dtype}."
            )
        self.images = images
        self.labels = labels.long()

    @classmethod
    def from_unit_range(cls, images: Tensor, labels: Tensor) -> "ResidentImages":
        """Rounds float images `(N, C, H, W)` in [0, 1] to 8 bits, `round(255 * pixel)`.

        Raises:
            ValueError: If a pixel is outside [0, 1].
        """
        low, high = (float(limit) for limit in torch.aminmax(images))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Expected pixels in [0, 1] but got pixels in [{low}, {high}].")
        return cls((images * 255).round().to(torch.uint8), labels)

    @classmethod
    def load(cls, source: LabeledImages, chunk: int = 500) -> "ResidentImages":
        """Reads `source` into memory, `chunk` images at a time, with a progress bar on a terminal.

        Images that are in memory already are returned as they are.
        """
        if isinstance(source, ResidentImages):
            return source
        hidden = not sys.stdout.isatty() or getattr(rank_zero_only, "rank", 0) != 0
        chunks = torch.arange(len(source)).split(chunk)
        batches = [
            source.__getitems__(indices.tolist())[0]
            for indices in track(chunks, "Reading images", transient=True, disable=hidden)
        ]
        return cls(torch.cat(batches), source.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns the images and labels at `indices`, on the device of the images."""
        # A blocking copy would stall the device once per batch.
        positions = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        return self.images[positions], self.labels[positions]

    def subset(self, indices: Sequence[int]) -> "ResidentImages":
        """Returns a copy of the images at `indices`."""
        return ResidentImages(*self.__getitems__(indices))

    def downsampled(self, factor: int) -> "ResidentImages":
        """Returns the images with blocks of `factor` x `factor` pixels averaged to one.

        Raises:
            ValueError: If a side is not a multiple of `factor`.

        Example:
            >>> pixels = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8).view(1, 1, 2, 2)
            >>> ResidentImages(pixels, torch.tensor([0])).downsampled(2).images.flatten()
            tensor([1], dtype=torch.uint8)
        """
        if factor == 1:
            return self
        height, width = self.images.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"Expected `downsample` to divide the sides {width}x{height} of the images"
                f" but got {factor}."
            )
        means = [avg_pool2d(part.float(), factor).round() for part in self.images.split(500)]
        return ResidentImages(torch.cat(means).to(torch.uint8), self.labels)

    def to(self, device: torch.device | str) -> "ResidentImages":
        """Returns the images on `device`, without a copy if they are there already."""
        return ResidentImages(self.images.to(device), self.labels.to(device))


class EvaluationImages(Dataset[tuple[Tensor, int]]):
    """The view of images that measures take: float32 images `(C, H, W)` in [0, 1], in order.

    Example:
        >>> white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
        >>> EvaluationImages(ResidentImages(white, torch.tensor([7])))[0]
        (tensor([[[1.]]]), 7)
    """

    def __init__(self, images: LabeledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns one image and its label."""
        image, label = self.images[index]
        return to_unit_range(image), label


def to_unit_range(images: Tensor) -> Tensor:
    """Converts uint8 images of any shape to float32 in [0, 1].

    Example:
        >>> to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float().div_(255)


def channel_statistics(images: LabeledImages, chunk: int = 500) -> tuple[list[float], list[float]]:
    """Computes mean and standard deviation of each channel, for pixels in [0, 1].

    Pixels are counted by value, `chunk` images at a time, so that the result is exact and does not
    depend on `chunk`.

    Raises:
        ValueError: If all pixels of a channel are equal.

    Example:
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
        >>> channel_statistics(ResidentImages(pixels, torch.tensor([0])))
        ([0.5], [0.5])
    """
    counts = torch.zeros(len(images[0][0]), 256, dtype=torch.double)
    for indices in torch.arange(len(images)).split(chunk):
        pixels, _ = images.__getitems__(indices.tolist())
        for channel, values in enumerate(pixels.transpose(0, 1).flatten(1)):
            counts[channel] += torch.bincount(values, minlength=256).cpu()
    values = torch.arange(256, dtype=torch.double) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = ((shares @ values**2) - mean**2).clamp(min=0).sqrt()
    if not bool((std > 1e-6).all()):
        raise ValueError(f"Expected pixels that differ in each channel but got std {std.tolist()}.")
    return mean.tolist(), std.tolist()
