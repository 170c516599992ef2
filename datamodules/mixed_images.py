"""Labelled and pseudo-labelled images as one data set, which tells them apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_flatness.datamodules.images import LabelledImages


class MixedImages(Dataset[Any]):
    """Labelled images, followed by pseudo-labelled ones.

    Args:
        labelled: images at positions 0 to L - 1.
        unlabeled: images at positions L and up, of the same size and on the same device.

    Example:
        >>> from robust_flatness.datamodules.resident import ResidentImages
        >>> pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> parts = [ResidentImages(pixels, torch.tensor(labels)) for labels in ([1, 2], [3, 4])]
        >>> images, labels, unlabeled = MixedImages(*parts).__getitems__([3, 0])
        >>> labels.tolist(), unlabeled.tolist()
        ([4, 1], [True, False])
    """

    def __init__(self, labelled: LabelledImages, unlabeled: LabelledImages) -> None:
        self.labelled = labelled
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        """Count all images."""
        return len(self.labelled) + len(self.unlabeled)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return images `(N, C, H, W)`, labels `(N,)`, and which are pseudo-labelled `(N,)`."""
        chosen = torch.as_tensor(indices)
        unlabeled = chosen >= len(self.labelled)
        positions = (chosen[~unlabeled], chosen[unlabeled] - len(self.labelled))
        parts = [
            source.__getitems__(part.tolist())
            for source, part in zip((self.labelled, self.unlabeled), positions, strict=True)
            if len(part)
        ]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        # Where each image came to lie, labelled ones first, and from there back into order.
        back = unlabeled.int().argsort(stable=True).argsort()
        back, unlabeled = (t.to(images.device, non_blocking=True) for t in (back, unlabeled))
        return images[back], labels[back], unlabeled
