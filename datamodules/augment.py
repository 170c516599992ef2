"""Augmentation of whole batches: flips and crops as one gather, on the device of the images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def random_flip_and_crop(
    images: Tensor,
    noise: Tensor,
    padding: int = 4,
    *,
    flip: bool = True,
    fill: Sequence[float] | None = None,
) -> Tensor:
    """Flip each image with probability 1/2, pad it, and cut out its size again.

    Where and whether is decided by `noise` alone, so that the caller owns the randomness: drawn
    for a global batch and cut into shares, it gives each process what a single one would have.

    The paper's code pads or crops each side by up to 4 pixels and resizes; this is the usual
    pad-and-crop in its place (paper, supplementary material, "crop by up to 4 pixels per side").

    Args:
        images: batch `(N, C, H, W)` of any type, not modified.
        noise: `(N, 3)` uniform in [0, 1): one column for flips, one for the vertical, and one
            for the horizontal position of the crop.
        padding: pixels of `fill` on each side, >= 0.
        flip: whether images are flipped; if not, the first column of `noise` is not used.
        fill: colour to pad with, one value a channel; `None` for zeros.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: if a shape, `padding` or `fill` does not fit.

    Example:
        >>> images = torch.arange(4).view(1, 1, 2, 2)
        >>> centre = 0.5
        >>> random_flip_and_crop(images, torch.tensor([[0.9, centre, centre]])).flatten().tolist()
        [0, 1, 2, 3]
        >>> random_flip_and_crop(images, torch.tensor([[0.1, centre, centre]])).flatten().tolist()
        [1, 0, 3, 2]
    """
    if images.dim() != 4 or noise.shape != (images.shape[0], 3):
        raise ValueError(
            "Expected `images` of shape (N, C, H, W) and `noise` of shape (N, 3)"
            f" but got {tuple(images.shape)} and {tuple(noise.shape)}."
        )
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
    # A gather of flat positions beats per-image slices, and the image's own stride costs nothing.
    flat = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = _pad(images, padding, fill).flatten(2)
    chosen = padded.gather(2, flat.view(n, 1, -1).expand(-1, channels, -1))
    return chosen.view(n, channels, height, width)


def colour_like(fill: Sequence[float], images: Tensor) -> Tensor:
    """Turn a colour into a tensor that broadcasts against `images`.

    Args:
        fill: one value a channel, in the units of `images`.
        images: batch `(N, C, H, W)`.

    Returns:
        `(C, 1, 1)` of the type and on the device of `images`.

    Raises:
        ValueError: if `fill` has another number of channels.

    Example:
        >>> colour_like([125, 3], torch.zeros(1, 2, 4, 4, dtype=torch.uint8)).flatten()
        tensor([125,   3], dtype=torch.uint8)
    """
    if len(fill) != images.shape[1]:
        raise ValueError(
            f"Expected `fill` to have a value for each of {images.shape[1]} channels"
            f" but got {len(fill)}."
        )
    colour = torch.tensor(list(fill), dtype=images.dtype).view(-1, 1, 1)
    # Non-blocking: a copy that waits would stall the device once a batch.
    return colour.to(images.device, non_blocking=True)


def _pad(images: Tensor, padding: int, fill: Sequence[float] | None) -> Tensor:
    """Add `padding` pixels of `fill` to each side; PyTorch's own pads all channels alike."""
    if fill is None:
        return F.pad(images, [padding] * 4)
    n, channels, height, width = images.shape
    padded = images.new_empty(n, channels, height + 2 * padding, width + 2 * padding)
    padded[:] = colour_like(fill, images)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    return padded
