"""Images that are held in memory, on the device that trains."""

import sys
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor

from robust_flatness.datamodules.images import Batch, LabelledImages


class ResidentImages(LabelledImages):
    """All images as one tensor of 8 bits a pixel, on any device.

    CIFAR-10's training images take 150 MB this way. Batches are cut out where the tensor lies, so
    that nothing is decoded, collated, or copied from the host while training.

    Args:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`, integers.

    Raises:
        ValueError: if the types or shapes are others.

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
        """Round pixels in [0, 1] to 8 bits.

        Args:
            images: `(N, C, H, W)`, floats in [0, 1].
            labels: `(N,)`, integers.

        Returns:
            The images with pixels `round(255 * pixel)`.

        Raises:
            ValueError: if a pixel lies outside [0, 1].
        """
        low, high = (float(limit) for limit in torch.aminmax(images))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Expected pixels in [0, 1] but got pixels in [{low}, {high}].")
        return cls((images * 255).round().to(torch.uint8), labels)

    @classmethod
    def load(cls, source: LabelledImages, chunk: int = 500) -> "ResidentImages":
        """Read all of `source` into memory, with a progress bar on a terminal.

        Args:
            source: images to read; those that are in memory are returned as they are.
            chunk: number of images to read at a time.

        Returns:
            The same images in memory, on the CPU.
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
        """Return the images and labels at `indices`, on the device where they lie."""
        # Non-blocking: a copy that waits would stall the device once a batch.
        chosen = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        return self.images[chosen], self.labels[chosen]

    def subset(self, indices: Sequence[int]) -> "ResidentImages":
        """Return a copy of the images at `indices`."""
        return ResidentImages(*self.__getitems__(indices))

    def to(self, device: torch.device | str) -> "ResidentImages":
        """Return the images on `device`; nothing is copied where they lie there already."""
        return ResidentImages(self.images.to(device), self.labels.to(device))
