"""Augmentation of whole batches: flips and crops as one gather, on the device of the images."""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_flip_and_crop(images: Tensor, noise: Tensor, padding: int = 4) -> Tensor:
    """Flip each image with probability 1/2, pad it with zeros, and cut out its size again.

    Where and whether is decided by `noise` alone, so that the caller owns the randomness: drawn
    for a global batch and cut into shares, it gives each process what a single one would have.

    The paper's code pads or crops each side by up to 4 pixels and resizes; this is the usual
    pad-and-crop in its place (paper, supplementary material, "crop by up to 4 pixels per side").

    Args:
        images: batch `(N, C, H, W)` of any type, not modified.
        noise: `(N, 3)` uniform in [0, 1): one column for flips, one for the vertical, and one
            for the horizontal position of the crop.
        padding: pixels of zeros on each side, >= 0.

    Returns:
        A batch of the same shape, type and device.

    Raises:
        ValueError: if a shape or `padding` does not fit.

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
    columns = left[:, None] + torch.where(noise[:, :1] < 0.5, columns.flip(1), columns)
    # A gather of flat positions beats per-image slices, and the image's own stride costs nothing.
    flat = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, [padding] * 4).flatten(2)
    chosen = padded.gather(2, flat.view(n, 1, -1).expand(-1, channels, -1))
    return chosen.view(n, channels, height, width)
