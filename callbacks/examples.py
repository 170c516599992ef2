"""The fixed images that a measure looks at."""

import hashlib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset

from robust_flatness.callbacks.delivery import (
    has_loader,
    has_own_hooks,
    read_delivery,
    source_of,
)
from robust_flatness.callbacks.loader_order import Batches, seed_all
from robust_flatness.functional.checks import check_examples

Normalization = tuple[Sequence[float], Sequence[float]]
ROUNDING = 1e-3
# Which images a run measures, by split and number, if its loader draws them at random.
_DRAWN: WeakKeyDictionary[Trainer, dict[str, Batches]] = WeakKeyDictionary()
_DRAWN_KEY = "robust_flatness_measured_images"


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


class FixedImages(Callback):
    """Keeps in checkpoints which images a run measures, so that a resumed run measures the same."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins a fit without what an earlier one drew; a checkpoint's comes afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _DRAWN.pop(trainer, None)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the indices of images that were drawn at random, if there are any."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if _DRAWN.get(trainer):
            checkpoint[_DRAWN_KEY] = dict(_DRAWN[trainer])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the indices of the run that goes on."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        _DRAWN[trainer] = dict(checkpoint.get(_DRAWN_KEY, {}))


def find_examples(
    trainer: Trainer,
    module: LightningModule,
    *,
    split: str,
    count: int,
    dataset: Dataset[Any] | None = None,
    normalization: Normalization | None = None,
    fixed: bool = True,
) -> Examples:
    """Reads the images of a split, the same on all ranks.

    They are those of `dataset`, else of the datamodule's `split_dataset(split)`, else those that
    the trainer's loader of that stage delivers first, see `delivery`. Transfer hooks of the user
    apply to the latter two.

    Args:
        trainer: The trainer, after its data was attached.
        module: The module.
        split: `train`, `val` or `test`.
        count: How many at most.
        dataset: Items begin with an image and a label.
        normalization: Mean and standard deviation that the images were normalised by, which is
            undone.
        fixed: Whether a training loader whose images change is refused.

    Raises:
        ValueError: If there is no such split, its images cannot be read without a trace in
            training, they are random, not in [0, 1], or not the same on all ranks, or labels are
            no class indices.
    """

    def read() -> Examples:
        data, own_hooks = dataset, False
        if dataset is None:
            source = source_of(trainer, split).instance
            if isinstance(source, LightningDataModule) and hasattr(source, "split_dataset"):
                data, own_hooks = source.split_dataset(split), has_own_hooks(trainer)
        if data is not None and not own_hooks:
            return read_examples(data, count, normalization)
        if not has_examples(trainer, split):
            raise ValueError(
                f"Expected a DataLoader for `split` {split} but got NoneType; pass `dataset=`, or "
                "another `split`."
            )
        drawn, key = _DRAWN.setdefault(trainer, {}), f"{split}/{count}"
        delivery = read_delivery(
            trainer,
            module,
            split,
            count,
            dataset=data,
            batches=drawn.get(key) if data is None else None,
            fixed=fixed and split == "train" and data is None,
        )
        if delivery.batches is not None and data is None:
            drawn[key] = delivery.batches
        return _examples(delivery.images, delivery.labels, normalization)

    return _same_on_all_ranks(trainer, read)


def has_examples(trainer: Trainer, split: str) -> bool:
    """Whether the trainer's data has a split, by a loader or by `split_dataset`."""
    source = source_of(trainer, split).instance
    own = isinstance(source, LightningDataModule) and hasattr(source, "split_dataset")
    return own or has_loader(trainer, split)


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
    return _examples(images, labels, normalization)


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


def _examples(images: Tensor, labels: Tensor, normalization: Normalization | None) -> Examples:
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


def _same_on_all_ranks(trainer: Trainer, read: Callable[[], Examples]) -> Examples:
    """What all ranks read, if it is the same; an error on one rank is one on all."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return read()
    examples, problem, digest = None, None, None
    try:
        examples = read()
        parts = (examples.images, examples.labels)
        digest = [hashlib.sha256(part.contiguous().numpy()).hexdigest() for part in parts]
    except Exception as error:
        problem = error
    results: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(results, (digest, problem and str(problem)))
    if problem is not None:
        raise problem
    for rank, (other, message) in enumerate(results):
        if message is not None:
            raise ValueError(f"Reading the measured images failed on rank {rank}: {message}")
        if other != digest:
            raise ValueError(
                f"Expected all ranks to measure the same images but rank {rank} read others than "
                f"rank {trainer.global_rank}; pass `dataset=`."
            )
    assert examples is not None
    return examples
