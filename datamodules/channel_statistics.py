"""Mean and standard deviation of each channel, for the normalisation in the network."""

import torch

from robust_flatness.datamodules.images import LabelledImages


def channel_statistics(images: LabelledImages, chunk: int = 500) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel over all pixels of all images.

    Pixels are counted by value, so the result is exact and the same for every `chunk`.

    Args:
        images: images of 8 bits, at least one.
        chunk: number of images to read at a time.

    Returns:
        Means and standard deviations, one of each a channel, for pixels in [0, 1].

    Raises:
        ValueError: if all pixels of a channel are equal, which nothing can normalise.

    Example:
        >>> from robust_flatness.datamodules.resident import ResidentImages
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
        >>> channel_statistics(ResidentImages(pixels, torch.tensor([0])))
        ([0.5], [0.5])
    """
    counts = torch.zeros(images[0][0].shape[0], 256, dtype=torch.double)
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
