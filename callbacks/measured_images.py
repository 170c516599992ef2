"""Which images a run measures: the same on all ranks, in all epochs, and when it is resumed."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from robust_flatness.callbacks.delivery import (
    Delivery,
    changing,
    has_loader,
    has_own_hooks,
    read_delivery,
    source_of,
)
from robust_flatness.callbacks.examples import (
    Examples,
    Normalization,
    make_examples,
    read_examples,
)
from robust_flatness.callbacks.loader_order import Batches
from robust_flatness.functional.checks import errors_on_all_ranks

CHECKPOINT_KEY = "robust_flatness_measured_images"
FEW = 64


@dataclass
class _Read:
    """What a run has read from its loaders, by split and number of images.

    Attributes:
        batches: Indices, if the loader draws them at random.
        digests: Of the images and labels.
        unchecked: Epoch and training images, a few, to be read again in a later epoch.
    """

    batches: dict[str, Batches] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    unchecked: tuple[int, Delivery] | None = None


_READ: WeakKeyDictionary[Trainer, _Read] = WeakKeyDictionary()


class FixedImages(Callback):
    """Sees to it that a run measures the same images in all epochs, also when it is resumed."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins a fit without what an earlier one read; a checkpoint's comes afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _READ[trainer] = _Read()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads some training images again in the second epoch, which may augment otherwise.

        Raises:
            ValueError: If they are not the same.
        """
        read = _READ.get(trainer)
        if read is None or read.unchecked is None or trainer.current_epoch <= read.unchecked[0]:
            return
        first, read.unchecked = read.unchecked[1], None
        count = len(first.images)
        now = read_delivery(trainer, pl_module, "train", count, batches=first.batches)
        if _digest(now) != _digest(first):
            raise ValueError(changing("train"))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds which images are measured, if a loader delivers them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        read = _READ.get(trainer)
        if read is not None and read.digests:
            checkpoint[CHECKPOINT_KEY] = {
                "batches": dict(read.batches),
                "digests": dict(read.digests),
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the images of the run that goes on."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        _READ[trainer] = _Read(**checkpoint.get(CHECKPOINT_KEY, {}))


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
        if data is not None:
            delivery = read_delivery(trainer, module, split, count, dataset=data)
            return make_examples(delivery.images, delivery.labels, normalization)
        return _delivered_examples(trainer, module, split, count, normalization, fixed)

    return _same_on_all_ranks(trainer, read)


def _delivered_examples(
    trainer: Trainer,
    module: LightningModule,
    split: str,
    count: int,
    normalization: Normalization | None,
    fixed: bool,
) -> Examples:
    earlier, key = _READ.setdefault(trainer, _Read()), f"{split}/{count}"
    fixed = fixed and split == "train"
    batches = earlier.batches.get(key)
    delivery = read_delivery(trainer, module, split, count, batches=batches, fixed=fixed)
    examples = make_examples(delivery.images, delivery.labels, normalization)
    if delivery.batches is not None:
        earlier.batches[key] = delivery.batches
    if trainer.state.fn == TrainerFn.FITTING:
        digest = _digest(delivery)
        if earlier.digests.setdefault(key, digest) != digest:
            rank_zero_warn(
                f"The {len(examples)} measured images of split {split} are not those that this run "
                "measured before: figures before and after are of different images."
            )
        if fixed:
            images, labels = delivery.images[:FEW].clone(), delivery.labels[:FEW]
            few = Delivery(images, labels, delivery.batches)
            earlier.unchecked = trainer.current_epoch, few
    return examples


def has_examples(trainer: Trainer, split: str) -> bool:
    """Whether the trainer's data has a split, by a loader or by `split_dataset`."""
    source = source_of(trainer, split).instance
    own = isinstance(source, LightningDataModule) and hasattr(source, "split_dataset")
    return own or has_loader(trainer, split)


def _digest(examples: Examples | Delivery) -> list[str]:
    parts = (examples.images, examples.labels)
    return [hashlib.sha256(part.contiguous().numpy().data).hexdigest() for part in parts]


def _same_on_all_ranks(trainer: Trainer, read: Callable[[], Examples]) -> Examples:
    """What all ranks read, if it is the same; an error on one rank is one on all."""
    with errors_on_all_ranks():
        examples = read()
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        digests: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(digests, _digest(examples))
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise ValueError(
                    "Expected all ranks to measure the same images but those of rank "
                    f"{rank} are not those of rank 0; pass `dataset=`."
                )
    return examples
