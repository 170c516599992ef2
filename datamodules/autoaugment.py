"""AutoAugment and Cutout of whole batches of 8 bits a pixel, on the device of the images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from robust_flatness.datamodules.augment import colour_like


def autoaugment(images: Tensor, noise: Tensor, fill: Sequence[float]) -> Tensor:
    """Apply torchvision's CIFAR-10 policy of Cubuk et al., *AutoAugment* (2019).

    Each draw picks one of 25 sub-policies, which operations of it act, and their signs. All of it
    follows from `noise`; PyTorch's global generators are left as they were.

    With one value per image, each image has a draw of its own, at the cost of transforming images
    one by one. With a single value, all images share one draw, and are transformed together.

    Grey images pass through all operations as well: colour saturation ("Color", in 5 of the 25
    sub-policies) leaves them as they are, all others act as on each channel of an RGB image.

    Args:
        images: batch `(N, C, H, W)`, uint8, of C = 1 or 3 channels; not modified.
        noise: uniform in [0, 1), on the CPU, `(N,)` for one draw per image or `(1,)` for one draw.
        fill: colour of what comes in from outside the image, one value in 0 to 255 a channel.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: if a shape or type does not fit.

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
    done = []
    # torchvision draws from the global generator of the CPU, wherever the images are. Only that
    # one is seeded: `torch.manual_seed` would reset those of the devices as well.
    with torch.random.fork_rng(devices=[]):
        # Uniform float32 numbers have 24 bits.
        for part, seed in zip(parts, (noise.double() * 2**24).long().tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            done.append(policy(part))
    return torch.cat(done)


def cutout(images: Tensor, noise: Tensor, size: int, fill: Sequence[float]) -> Tensor:
    """Cover one square in each image, after DeVries and Taylor, *Cutout* (2017).

    The centre of the square is uniform over the pixels of the image, so what of it lies outside is
    lost: between a quarter and all of `size * size` pixels are covered.

    Args:
        images: batch `(N, C, H, W)` of any type, not modified.
        noise: `(N, 2)` uniform in [0, 1): vertical and horizontal position of the centre.
        size: side of the square in pixels, >= 0.
        fill: colour of the square, one value a channel in the units of `images`.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: if a shape, `size` or `fill` does not fit.

    Example:
        >>> images = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        >>> cutout(images, torch.tensor([[0.0, 0.5]]), size=2, fill=[7])[0, 0, :2].tolist()
        [[1, 7, 7, 1], [1, 1, 1, 1]]
    """
    if images.dim() != 4 or noise.shape != (images.shape[0], 2):
        raise ValueError(
            "Expected `images` of shape (N, C, H, W) and `noise` of shape (N, 2)"
            f" but got {tuple(images.shape)} and {tuple(noise.shape)}."
        )
    if size < 0:
        raise ValueError(f"Expected `size` to be >= 0 but got {size}.")
    rows = _covered(noise[:, 0], images.shape[2], size)
    columns = _covered(noise[:, 1], images.shape[3], size)
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(hole, colour_like(fill, images), images)


def _covered(noise: Tensor, length: int, size: int) -> Tensor:
    """Tell which of `length` rows or columns the square covers, `(N, length)`."""
    first = (noise * length).long().clamp_(max=length - 1)[:, None] - size // 2
    positions = torch.arange(length, device=noise.device)
    return (positions >= first) & (positions < first + size)
