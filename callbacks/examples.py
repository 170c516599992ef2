"""The fixed images that a measure looks at."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset

from robust_flatness.callbacks.loader_order import seed_all
from robust_flatness.functional.checks import check_examples

Normalization = tuple[Sequence[float], Sequence[float]]
ROUNDING = 1e-3


@dataclass(frozen=True)
class Examples:
    """Images `(N, C, H, W)` in [0, 1] and labels `(N,)`, on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class PixelInput(nn.Module):
    """Feeds pixels in [0, 1] to a module that expects normalised images.

    Args:
        module: Takes `(images - mean) / std`.
        normalization: Per-channel mean and standard deviation.
    """

    def __init__(self, module: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.module, self.normalization = module, normalization

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        mean, std = _channels(self.normalization, images)
        logits: Tensor = self.module((images - mean) / std)
        return logits


def _channels(normalization: Normalization, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (images.new_tensor(list(values)).view(-1, 1, 1) for values in normalization)
    return mean, std


def warn_of_one_class(examples: Examples, num_classes: int, split: str) -> None:
    """Warns if all images are of one class although the network has more.

    Args:
        examples: The measured images.
        num_classes: Number of the network's logits.
        split: The split, for the message.
    """
    if len(examples) > 1 and num_classes > 1 and len(examples.labels.unique()) == 1:
        rank_zero_warn(
            f"All {len(examples)} measured images of split {split} are of class "
            f"{int(examples.labels[0])} although the network has {num_classes} classes. If the "
            "data are sorted by class, raise `num_examples` or pass a shuffled `dataset=`."
        )


def read_examples(
    dataset: Dataset[Any], count: int, normalization: Normalization | None = None
) -> Examples:
    """Reads the first images of a dataset, in order.

    Args:
        dataset: Items begin with an image and a label.
        count: How many at most.
        normalization: Mean and standard deviation that the dataset's images were normalised by,
            which is undone.

    Returns:
        The examples, copied to the CPU.

    Raises:
        ValueError: If the dataset is empty, the pixels are not in [0, 1], or labels are no class
            indices.
    """
    size = min(count, len(dataset)) if isinstance(dataset, Sized) else count
    if size == 0:
        raise ValueError("Expected `dataset` to have images but got an empty one.")
    with isolate_rng():
        # Random transforms give the same images in every run, and take no numbers from training.
        seed_all(0)
        images, labels = _read(dataset, size)
    return make_examples(images, labels, normalization)


def _read(dataset: Dataset[Any], size: int) -> tuple[Tensor, Tensor]:
    try:
        items = [dataset[i] for i in range(size)]
        images = torch.stack([item[0] for item in items]).cpu()
        return images, torch.stack([torch.as_tensor(item[1]).cpu() for item in items])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "Expected `dataset` to have items that begin with an image tensor, all of one shape, "
            f"and a label, but got {type(dataset).__name__} ({error})."
        ) from error


def make_examples(
    images: Tensor, labels: Tensor, normalization: Normalization | None = None
) -> Examples:
    """Checks images and labels and undoes a normalisation.

    Args:
        images: `(N, C, H, W)`.
        labels: Class indices `(N,)` or `(N, 1)`.
        normalization: Mean and standard deviation that the images were normalised by.

    Raises:
        ValueError: If pixels are not in [0, 1], or labels are no class indices.

    Example:
        >>> make_examples(torch.zeros(2, 1, 4, 4), torch.tensor([[3], [1]])).labels
        tensor([3, 1])
    """
    if normalization is not None:
        mean, std = _channels(normalization, images)
        images = images * std + mean
        if images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING:
            images = images.clamp(0, 1)
    labels = _class_indices(labels)
    check_examples(images, labels)
    return Examples(images, labels)


def _class_indices(labels: Tensor) -> Tensor:
    """Labels `(N,)` from `(N,)` or `(N, 1)`; several or soft labels of an image are an error."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    whole = not labels.is_complex() and torch.equal(labels, labels.long().to(labels))
    if labels.ndim == 1 and whole:
        return labels.long()
    found = f"{labels.dtype} of shape {tuple(labels.shape)}" + ("" if whole else " with fractions")
    raise ValueError(
        f"Expected `labels` to be one class index for each image, of shape (N,) or (N, 1), but got "
        f"{found}; soft and multiple labels have no robust error, pass `dataset=` with class "
        "indices."
    )
