"""Labeled images of 8 bits per channel, by position, and the splits that they are divided into."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset

from robust_flatness.functional.checks import check_choice, check_count

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images `(N, C, H, W)` and their labels `(N,)`, int64."""

ValFrom: TypeAlias = Literal["test", "train"]
"""The set that the images for early stopping are taken from."""

_ORDER_SEED = 0  # another seed would change the images of all earlier results


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
    """The view of images that measures take: float32 images `(C, H, W)` in [0, 1], in order."""

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

    Pixels are counted by value, so that the result is exact and does not depend on `chunk`.

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


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of images of the splits, see `RobustDataModule`."""

    num_train: int | None
    num_train_eval: int
    num_val: int
    num_test: int
    val_from: ValFrom

    def __post_init__(self) -> None:
        for name in ("num_train", "num_train_eval", "num_val", "num_test"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low=1)
        check_choice("val_from", self.val_from, get_args(ValFrom))


def make_splits(
    train_order: Sequence[int],
    test_order: Sequence[int],
    sizes: SplitSizes,
    *,
    with_val: bool = True,
) -> dict[str, list[int]]:
    """Divides the ordered training and test images into splits; `val` overlaps no other split.

    Args:
        train_order: Positions of the training images, see `RobustDataModule.orders`.
        test_order: Positions of the test images.
        sizes: Numbers of images.
        with_val: Whether `val` is needed; if not, it is empty if there are too few test images.

    Returns:
        The positions of `"training"`, all images to train on, `"train"`, `"val"` and `"test"`.

    Example:
        >>> sizes = SplitSizes(None, num_train_eval=2, num_val=2, num_test=3, val_from="test")
        >>> make_splits(range(4), range(6), sizes)
        {'training': [0, 1, 2, 3], 'train': [0, 1], 'val': [4, 5], 'test': [0, 1, 2]}
    """
    training, test = list(train_order), list(test_order)
    num_val = sizes.num_val
    if sizes.val_from == "train":
        if num_val >= len(training):
            raise ValueError(
                f"Expected `num_val` to be below the number of training images {len(training)}"
                f" if `val_from` is 'train' but got {num_val}."
            )
        training, val = training[:-num_val], training[-num_val:]
        num_val = 0
    elif with_val or len(test) >= sizes.num_test + num_val:
        val = test[-num_val:]
    else:
        val, num_val = [], 0
    if len(test) < sizes.num_test + num_val:
        raise ValueError(
            f"Expected at least {sizes.num_test + num_val} test images for `num_test`"
            f" {sizes.num_test} and `num_val` {num_val} but got {len(test)}."
        )
    if sizes.num_train is not None and sizes.num_train > len(training):
        raise ValueError(
            f"Expected `num_train` to be at most {len(training)}, the number of training images,"
            f" but got {sizes.num_train}."
        )
    if not training:
        raise ValueError("Expected at least 1 training image but got none.")
    training = training[: sizes.num_train]
    train, test = training[: sizes.num_train_eval], test[: sizes.num_test]
    return {"training": training, "train": train, "val": val, "test": test}


def fixed_permutation(length: int) -> list[int]:
    """Returns a permutation of 0 to `length - 1` that depends neither on the run nor on its seed.

    It orders images that are sorted by class, or that have no test set of their own.

    Example:
        >>> fixed_permutation(5) == fixed_permutation(5)
        True
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    return torch.randperm(length, generator=generator).tolist()
