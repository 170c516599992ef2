"""What is done to training images before each step: nothing, flips and crops, or AutoAugment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from robust_flatness.datamodules.augment import random_flip_and_crop
from robust_flatness.datamodules.autoaugment import autoaugment, cutout
from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.functional.checks import check_choice

Augment: TypeAlias = Literal["none", "flip_crop", "autoaugment", "autoaugment_batch"]
"""How training images are augmented."""


@dataclass(frozen=True)
class Augmentation:
    """Augments batches of training images, in proportion to their size.

    `"flip_crop"` flips, pads with zeros by an eighth of the side (4 pixels at 32, 1 at 8) and
    crops. `"autoaugment"` is the paper's row (supplementary material, and `common.py` of its code):
    pad with the mean colour, crop, flip, AutoAugment's CIFAR-10 policy, and Cutout of half the side
    (16 pixels at 32) in the mean colour. `"autoaugment_batch"` draws one sub-policy for the global
    batch in place of one per image, which is faster; crops, flips and squares are still per image.

    Args:
        kind: one of the above, or `"none"`.
        flip: whether images are flipped.
        mean: mean of each channel in [0, 1], for the two kinds of AutoAugment.

    Raises:
        ValueError: if `kind` is unknown, or AutoAugment cannot take that many channels.

    Example:
        >>> import torch
        >>> augmentation, batches = Augmentation("flip_crop"), GlobalBatches(4, 1, 0, seed=0)
        >>> noise = augmentation.noise(batches, local_size=4, epoch=0, batch=0)
        >>> augmentation(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), noise).shape
        torch.Size([4, 3, 8, 8])
    """

    kind: Augment
    flip: bool = True
    mean: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_choice("augment", self.kind, get_args(Augment))
        if self.needs_mean(self.kind) and len(self.mean) not in (1, 3):
            raise ValueError(
                f"Expected images of 1 or 3 channels where `augment` is {self.kind!r}"
                f" but got {len(self.mean)} channels."
            )

    @staticmethod
    def needs_mean(kind: Augment) -> bool:
        """Tell whether `kind` fills in the mean colour."""
        return kind in ("autoaugment", "autoaugment_batch")

    def noise(self, batches: GlobalBatches, local_size: int, epoch: int, batch: int) -> Tensor:
        """Draw this process's part of the noise for a global batch, `(n, 3)` or `(n, 6)`.

        Columns: flip, top and left of the crop; centre of the square; sub-policy.
        """
        if not self.needs_mean(self.kind):
            return batches.noise(local_size, epoch, batch)
        shared = int(self.kind == "autoaugment_batch")
        return batches.noise(local_size, epoch, batch, columns=6, shared=shared)

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: `(n, C, H, W)`, uint8, not modified.
            noise: what `noise` drew for it, on the CPU.

        Returns:
            A batch of the same shape, type and device.
        """
        if self.kind == "none":
            return images
        side = min(images.shape[2:])
        padding = max(1, side // 8)
        near = noise.to(images.device, non_blocking=True)
        if self.kind == "flip_crop":
            return random_flip_and_crop(images, near, padding, flip=self.flip)
        colour = [round(255 * value) for value in self.mean]
        images = random_flip_and_crop(images, near[:, :3], padding, flip=self.flip, fill=colour)
        policies = noise[:, 5] if self.kind == "autoaugment" else noise[:1, 5]
        images = autoaugment(images, policies, colour)
        return cutout(images, near[:, 3:5], side // 2, colour)
