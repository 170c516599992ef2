"""The view of images that measures take: floats in [0, 1], one at a time, always in order."""

from torch import Tensor
from torch.utils.data import Dataset

from robust_flatness.datamodules.images import LabelledImages, to_unit_range


class EvaluationImages(Dataset[tuple[Tensor, int]]):
    """Item `i` is the `i`-th image as float32 `(C, H, W)` in [0, 1], and its label.

    Args:
        images: the images of 8 bits behind it.

    Example:
        >>> import torch
        >>> from robust_flatness.datamodules.resident import ResidentImages
        >>> white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
        >>> EvaluationImages(ResidentImages(white, torch.tensor([7])))[0]
        (tensor([[[1.]]]), 7)
    """

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        image, label = self.images[index]
        return to_unit_range(image), label
