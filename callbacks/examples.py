"""The fixed images that a measure looks at."""

import random
from collections.abc import Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
)

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
        ValueError: If the dataset is empty or the pixels are not in [0, 1].
    """
    size = min(count, len(dataset)) if isinstance(dataset, Sized) else count
    if size == 0:
        raise ValueError("Expected `dataset` to have images but got an empty one.")
    with isolate_rng():
        # Random transforms give the same images in every run, and take no numbers from training.
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        images, labels = _read(dataset, size)
    if normalization is not None:
        mean, std = _channels(normalization, images)
        images = images * std + mean
        if images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING:
            images = images.clamp(0, 1)
    check_examples(images, labels)
    return Examples(images, labels)


def _read(dataset: Dataset[Any], size: int) -> tuple[Tensor, Tensor]:
    try:
        items = [dataset[i] for i in range(size)]
        images = torch.stack([item[0] for item in items]).cpu()
        return images, torch.as_tensor([int(item[1]) for item in items])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "Expected `dataset` to have items that begin with an image tensor, all of one shape, "
            f"and a label, but got {type(dataset).__name__} ({error})."
        ) from error


def find_dataset(trainer: Trainer, module: LightningModule, split: str) -> Dataset[Any]:
    """The dataset that holds a split, where the user named none.

    The datamodule's `split_dataset(split)` if it has one, else the dataset of the trainer's own
    loader for that stage: its transforms apply, its shuffling does not.

    Args:
        trainer: The trainer, after its loaders were made.
        module: The module.
        split: `train`, `val` or `test`.

    Raises:
        ValueError: If there is none.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if hasattr(datamodule, "split_dataset"):
        found: Dataset[Any] = datamodule.split_dataset(split)
        return found
    loaders: dict[str, Any] = {
        "train": trainer.train_dataloader,
        "val": trainer.val_dataloaders,
        "test": trainer.test_dataloaders,
    }
    loader = loaders[split]
    if loader is None and split == "test":
        # In `fit` Lightning makes no test loader: ask whoever would be asked in `test`.
        with suppress(Exception):
            loader = (datamodule or module).test_dataloader()
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Expected a DataLoader for `split` {split} but got {type(loader).__name__}; "
            f"pass `dataset=`, or another `split`."
        )
    return _as_loaded(loader, split)


def _as_loaded(loader: DataLoader[Any], split: str) -> Dataset[Any]:
    """The loader's dataset, or the part of it that its sampler draws from."""
    indices = getattr(loader.sampler, "indices", None)
    if indices is not None:
        return Subset(loader.dataset, list(indices))
    if isinstance(loader.sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        return loader.dataset
    raise ValueError(
        f"Expected the loader of `split` {split} to go through its dataset but got a "
        f"{type(loader.sampler).__name__}, which may leave images out; pass `dataset=`."
    )
