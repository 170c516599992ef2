"""Augmentation of whole batches of training images, on the device of the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.functional.checks import check_choice

Augment: TypeAlias = Literal["none", "flip", "flip_crop", "autoaugment", "autoaugment_batch"]
"""Names of the augmentations."""

FILLED = ("autoaugment", "autoaugment_batch")  # with the mean color


@dataclass(frozen=True)
class Augmentation:
    """Augments batches of training images, in proportion to their size.

    `"flip"` flips each image with probability 1/2. `"flip_crop"` flips, pads with zeros by an
    eighth of the side (4 pixels at 32, 1 at 8) and crops. `"autoaugment"` is the paper's row
    (supplementary material, and `common.py` of its code):
    pad with the mean color, crop, flip, AutoAugment's CIFAR-10 policy, and Cutout of half the side
    (16 pixels at 32) in the mean color. `"autoaugment_batch"` draws one sub-policy for the global
    batch instead of one per image, which is faster; crops, flips and squares are still per image.

    Args:
        kind: One of the above, or `"none"`.
        flip: Whether images are flipped.
        mean: Mean of each channel in [0, 1], for the two kinds of AutoAugment.

    Example:
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
        if self.kind in FILLED and len(self.mean) not in (1, 3):
            raise ValueError(
                f"Expected images of 1 or 3 channels if `augment` is {self.kind!r}"
                f" but got {len(self.mean)} channels."
            )

    def noise(self, batches: GlobalBatches, local_size: int, epoch: int, batch: int) -> Tensor:
        """Draws this process's part of the noise for a global batch, `(n, 3)` or `(n, 6)`.

        The columns are flip, top and left of the crop, center of the square (2), and sub-policy.
        """
        columns, shared = 6 if self.kind in FILLED else 3, int(self.kind == "autoaugment_batch")
        return batches.noise(local_size, epoch, batch, columns=columns, shared=shared)

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """Augments uint8 images `(n, C, H, W)` with the result of `noise`, on the CPU."""
        if self.kind == "none":
            return images
        side = min(images.shape[2:])
        padding = max(1, side // 8)
        moved = noise.to(images.device, non_blocking=True)
        if self.kind in ("flip", "flip_crop"):
            padding = padding if self.kind == "flip_crop" else 0
            return random_flip_and_crop(images, moved, padding, flip=self.flip)
        color = [round(255 * value) for value in self.mean]
        images = random_flip_and_crop(images, moved[:, :3], padding, flip=self.flip, fill=color)
        policies = noise[:, 5] if self.kind == "autoaugment" else noise[:1, 5]
        images = autoaugment(images, policies, color)
        return cutout(images, moved[:, 3:5], side // 2, color)


def random_flip_and_crop(
    images: Tensor,
    noise: Tensor,
    padding: int = 4,
    *,
    flip: bool = True,
    fill: Sequence[float] | None = None,
) -> Tensor:
    """Flips each image with probability 1/2, pads it, and crops it to its size.

    `noise` alone decides flips and positions. The paper's code pads or crops each side by up to 4
    pixels and resizes; this is the common padding and cropping (paper, supplementary material,
    "crop by up to 4 pixels per side").

    Args:
        images: Batch `(N, C, H, W)` of any type, not modified.
        noise: `(N, 3)`, uniform in [0, 1): for the flip, and for the vertical and the horizontal
            position of the crop.
        padding: Pixels of `fill` on each side, >= 0.
        flip: Whether images are flipped; if not, the first column of `noise` is not used.
        fill: Color of the padding, one value per channel; `None` for zeros.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: If a shape, `padding` or `fill` does not fit.

    Example:
        >>> images = torch.arange(4).view(1, 1, 2, 2)
        >>> random_flip_and_crop(images, torch.tensor([[0.9, 0.5, 0.5]])).flatten().tolist()
        [0, 1, 2, 3]
        >>> random_flip_and_crop(images, torch.tensor([[0.1, 0.5, 0.5]])).flatten().tolist()
        [1, 0, 3, 2]
    """
    _check_shapes(images, noise, columns=3)
    if padding < 0:
        raise ValueError(f"Expected `padding` to be >= 0 but got {padding}.")
    n, channels, height, width = images.shape
    offsets = (noise[:, 1:] * (2 * padding + 1)).long().clamp_(max=2 * padding)
    top, left = offsets.unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if flip:
        columns = torch.where(noise[:, :1] < 0.5, columns.flip(1), columns)
    columns = left[:, None] + columns
    if fill is None:
        padded = F.pad(images, [padding] * 4)
    else:  # `F.pad` has one value for all channels.
        size = (n, channels, height + 2 * padding, width + 2 * padding)
        padded = _color(fill, images).expand(size).clone()
        padded[:, :, padding : padding + height, padding : padding + width] = images
    # One gather of flat positions is faster than a slice per image.
    flat = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    pixels = padded.flatten(2).gather(2, flat.view(n, 1, -1).expand(-1, channels, -1))
    return pixels.view(n, channels, height, width)


def autoaugment(images: Tensor, noise: Tensor, fill: Sequence[float]) -> Tensor:
    """Applies torchvision's CIFAR-10 policy of Cubuk et al., *AutoAugment* (2019).

    Each draw chooses one of 25 sub-policies, which of its operations are applied, and their signs.
    `noise` alone decides all of it; PyTorch's global generators keep their states. Color saturation
    ("Color", in 5 of the 25 sub-policies) does not change gray images; all other operations act as
    on each channel of an RGB image.

    Args:
        images: Batch `(N, C, H, W)`, uint8, of C = 1 or 3 channels; not modified.
        noise: Uniform in [0, 1), on the CPU, `(N,)` for one draw per image, or `(1,)` for one draw
            for all, which are then transformed together and faster.
        fill: Color outside of the image, one value in 0 to 255 per channel.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: If a shape or type does not fit.

    Example:
        >>> images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4).expand(5, -1, -1, -1)
        >>> together = autoaugment(images, torch.tensor([0.3]), fill=[125, 123, 114])
        >>> bool((together == together[:1]).all())
        True
    """
    if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(
            "Expected `images` of shape (N, C, H, W), 1 or 3 channels and type torch.uint8"
            f" but got {tuple(images.shape)} and {images.dtype}."
        )
    if noise.shape not in ((len(images),), (1,)):
        raise ValueError(
            f"Expected `noise` of shape ({len(images)},) or (1,) but got {tuple(noise.shape)}."
        )
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=list(fill))
    parts = images.split(1) if len(noise) > 1 else (images,)
    # Uniform float32 numbers have 24 bits.
    seeds = (noise.double() * 2**24).long().tolist()
    augmented = []
    # torchvision draws from the CPU's global generator on all devices. Only this one is seeded:
    # `torch.manual_seed` would seed those of the devices as well.
    with torch.random.fork_rng(devices=[]):
        for part, seed in zip(parts, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            augmented.append(policy(part))
    return torch.cat(augmented)


def cutout(images: Tensor, noise: Tensor, size: int, fill: Sequence[float]) -> Tensor:
    """Covers one square of each image, after DeVries and Taylor, *Cutout* (2017).

    The center of the square is uniform over the pixels of the image, and the square may extend
    beyond the image: between a quarter and all of `size * size` pixels are covered.

    Args:
        images: Batch `(N, C, H, W)` of any type, not modified.
        noise: `(N, 2)`, uniform in [0, 1): vertical and horizontal position of the center.
        size: Side of the square in pixels, >= 0.
        fill: Color of the square, one value per channel in the units of `images`.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: If a shape, `size` or `fill` does not fit.

    Example:
        >>> images = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        >>> cutout(images, torch.tensor([[0.0, 0.5]]), size=2, fill=[7])[0, 0, :2].tolist()
        [[1, 7, 7, 1], [1, 1, 1, 1]]
    """
    _check_shapes(images, noise, columns=2)
    if size < 0:
        raise ValueError(f"Expected `size` to be >= 0 but got {size}.")
    covered = []  # rows and columns, `(N, length)`
    for draw, length in zip(noise.unbind(1), images.shape[2:]):
        first = (draw * length).long().clamp_(max=length - 1)[:, None] - size // 2
        positions = torch.arange(length, device=noise.device)
        covered.append((positions >= first) & (positions < first + size))
    square = covered[0][:, None, :, None] & covered[1][:, None, None, :]
    return torch.where(square, _color(fill, images), images)


def _check_shapes(images: Tensor, noise: Tensor, *, columns: int) -> None:
    if images.dim() != 4 or noise.shape != (len(images), columns):
        raise ValueError(
            f"Expected `images` of shape (N, C, H, W) and `noise` of shape (N, {columns})"
            f" but got {tuple(images.shape)} and {tuple(noise.shape)}."
        )


def _color(fill: Sequence[float], images: Tensor) -> Tensor:
    """Returns a color `(C, 1, 1)` of the type and on the device of `images`."""
    if len(fill) != images.shape[1]:
        raise ValueError(
            f"Expected `fill` to have a value for each of {images.shape[1]} channels"
            f" but got {len(fill)}."
        )
    color = torch.tensor(list(fill), dtype=images.dtype).view(-1, 1, 1)
    # A blocking copy would stall the device once per batch.
    return color.to(images.device, non_blocking=True)
