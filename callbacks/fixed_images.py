"""Which images a callback looks at: the same in all epochs, on all processes, after a resume."""

import hashlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar, get_args
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from robust_flatness.callbacks.delivery import (
    Delivery,
    changing,
    check_no_indices,
    has_own_hooks,
    read_delivery,
    source_of,
)
from robust_flatness.callbacks.loader_order import Batches, Refusal, seed_all
from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_examples,
    check_strategy,
    errors_on_all_ranks,
    takes,
)
from robust_flatness.measures.base import Examples, Split

Normalization = tuple[Sequence[float], Sequence[float]]
# How far pixels may be outside of [0, 1] after a normalization was undone.
ROUNDING = 1e-3
CHECKPOINT_KEY = "robust_flatness_measured_images"
# Number of training images that are read again in the second epoch, and of labels that say which
# classes there are.
FEW = 64


@dataclass
class _Read:
    """What a run has read from its loaders, by split and number of images."""

    # Indices, if the loader draws them at random.
    batches: dict[str, Batches] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    # Epoch and a few training images, to be read again in a later epoch.
    unchecked: tuple[int, Delivery] | None = None


_READ: WeakKeyDictionary[Trainer, _Read] = WeakKeyDictionary()


class FixedImages(Callback):
    """Reads the images of a split once for a run; a resumed run has the same ones.

    The images are those of `dataset`, else of the datamodule's `split_dataset(split)`, else those
    that the trainer's loader of that stage delivers first: its sampler or batch sampler, its
    `collate_fn`, the transfer hooks of module and datamodule, `limit_*_batches` and
    `overfit_batches` apply. A shuffled set counts in its own order; a part that is drawn at random
    is drawn once for a run and kept in its checkpoints. A loader is read in a fork of the process,
    so that training does not notice. These raise an error: sampling with replacement, iterable
    datasets, training images that change (random augmentation), processes that read different
    images. A datamodule with random augmentation can define `split_dataset(split)`, which returns
    a dataset of pairs without it.

    Args:
        split: `train`, `val` or `test`.
        dataset: Items `(image, label)`, read as they are; None takes the images of the data. In
            `trainer.test` after `fit`, a split that the test does not have is that of `fit`.
        num_examples: Number of images, the first ones; all of them if there are fewer.
        normalization: `(mean, std)` if module and dataset use normalized images; attacks act on
            pixels in [0, 1] all the same.
        **kwargs: Arguments of the next base class, such as `measure` of `EpochMeasure`.

    Attributes:
        images_must_stay: Whether training images that change are refused.

    Raises:
        ValueError: If an argument is out of range; before training, if the images are not sure, or
            labels are not one class index for each image.
    """

    images_must_stay: ClassVar[bool] = True

    def __init__(
        self,
        *,
        split: Split = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 1000,
        normalization: Normalization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("split", split, get_args(Split))
        check_count("num_examples", num_examples, low=1)
        if normalization is not None:
            channels(normalization)  # Checks it.
        self.split, self.dataset = split, dataset
        self.num_examples, self.normalization = num_examples, normalization
        self._examples: dict[str, Examples] = {}
        self._examples_of_fit: dict[str, Examples] = {}
        self._compared = False

    def dataset_of(self, split: str) -> Dataset[Any] | None:
        """Returns the dataset of a split; None takes the images of the data."""
        return self.dataset

    def examples(
        self, trainer: Trainer, pl_module: LightningModule, split: str | None = None
    ) -> Examples:
        """Returns the images of a split, read once, on the CPU."""
        split = split or self.split
        if split not in self._examples:
            dataset = self.dataset_of(split)
            earlier = self._examples_of_fit.get(split)
            # `trainer.test` forgets the loaders of `fit`.
            if earlier is None or dataset is not None or has_examples(trainer, split):
                # Inference tensors could not take part in an attack.
                with isolate_rng(), torch.inference_mode(False), torch.no_grad():
                    with errors_on_all_ranks():
                        earlier = self._read(trainer, pl_module, split, dataset)
                    _check_alike(trainer, earlier)
            self._examples[split] = earlier
        return self._examples[split]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer, type(self).__name__)
        super().setup(trainer, pl_module, stage)
        self._examples_of_fit = {} if stage == "fit" else self._examples_of_fit | self._examples
        self._examples, self._compared = {}, False
        if stage == "fit":
            _READ[trainer] = _Read()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._examples and self.normalization is None and not self._compared:
            self._warn_of_normalized(batch)
        self._compared = True
        # Some training images are read again in the second epoch, which may augment otherwise.
        read = _READ.get(trainer)
        if read is None or read.unchecked is None or trainer.current_epoch <= read.unchecked[0]:
            return
        first, read.unchecked = read.unchecked[1], None
        count = len(first.images)
        now = read_delivery(trainer, pl_module, "train", count, batches=first.batches)
        if _digest(now) != _digest(first):
            raise ValueError(changing("train"))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        read = _READ.get(trainer)
        if read is not None and read.digests:
            checkpoint[CHECKPOINT_KEY] = {
                "batches": dict(read.batches),
                "digests": dict(read.digests),
            }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        _READ[trainer] = _Read(**checkpoint.get(CHECKPOINT_KEY, {}))

    def _read(
        self,
        trainer: Trainer,
        module: LightningModule,
        split: str,
        dataset: Dataset[Any] | None,
    ) -> Examples:
        count, own_hooks = self.num_examples, False
        if dataset is None and _has_split_dataset(trainer, split):
            # Transfer hooks of the user apply to what its datamodule delivers.
            dataset, own_hooks = _split_dataset(trainer, split), has_own_hooks(trainer)
        if dataset is not None and not own_hooks:
            return self._make(*_read_items(dataset, count))
        if not has_examples(trainer, split):
            raise ValueError(
                f"Expected a DataLoader for `split` {split} but got NoneType; pass `dataset=`, or "
                "another `split`."
            )
        if dataset is not None:
            delivery = read_delivery(trainer, module, split, count, dataset=dataset)
            return self._make(delivery.images, delivery.labels)
        earlier, key = _READ.setdefault(trainer, _Read()), f"{split}/{count}"
        fixed = self.images_must_stay and split == "train"
        batches = earlier.batches.get(key)
        delivery = read_delivery(trainer, module, split, count, batches=batches, fixed=fixed)
        examples = self._make(delivery.images, delivery.labels)
        if delivery.batches is not None:
            earlier.batches[key] = delivery.batches
        if trainer.state.fn == TrainerFn.FITTING:
            digest = _digest(delivery)
            if earlier.digests.setdefault(key, digest) != digest:
                rank_zero_warn(
                    f"The {len(examples)} measured images of split {split} are not those that this "
                    "run measured before: metrics before and after are of different images."
                )
            if fixed:
                images, labels = delivery.images[:FEW].clone(), delivery.labels[:FEW]
                few = Delivery(images, labels, delivery.batches)
                earlier.unchecked = trainer.current_epoch, few
        return examples

    def _warn_of_normalized(self, batch: Any) -> None:
        """Warns if a batch of training is normalized, and measured images are pixels."""
        images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
        if not isinstance(images, Tensor) or not images.is_floating_point() or not len(images):
            return
        low, high = images.min().item(), images.max().item()
        # Noise of augmentation may leave [0, 1].
        if low < -0.5 or high > 1.5:
            rank_zero_warn(
                f"{type(self).__name__} gives the module pixels in [0, 1] of split "
                f"{', '.join(self._examples)}, but training gives it images in [{low:.3g}, "
                f"{high:.3g}]: if these are normalized, set `normalization=(mean, std)` and "
                "normalize the images of `dataset=` or `split_dataset` too."
            )

    def _make(self, images: Tensor, labels: Tensor) -> Examples:
        """Checks images and labels and undoes a normalization."""
        if self.normalization is not None:
            check_normalized(images, self.normalization)
            mean, std = (values.to(images) for values in channels(self.normalization))
            images = images * std + mean
            if images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING:
                images = images.clamp(0, 1)
        labels = _class_indices(labels)
        check_examples(images, labels)
        return Examples(images, labels, range(len(labels)))


class PixelInput(nn.Module):
    """Feeds pixels in [0, 1] to a module that expects normalized images.

    Args:
        module: Takes `(images - mean) / std`.
        normalization: Mean and standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.module = module
        for name, values in zip(("mean", "std"), channels(normalization)):
            self.register_buffer(name, values)
        # Copied to the device once, not in each forward.
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        key = images.device, images.dtype
        if key not in self._copies:
            self._copies[key] = self.mean.to(images), self.std.to(images)
        mean, std = self._copies[key]
        logits: Tensor = self.module((images - mean) / std)
        return logits


def has_examples(trainer: Trainer, split: str) -> bool:
    """Returns whether the trainer's data has a split, by a loader or by `split_dataset`."""
    source = source_of(trainer, split)
    has_loader = source.instance is not None and source.is_defined()
    return has_loader or _has_split_dataset(trainer, split)


def warn_of_one_class(examples: Examples, num_classes: int, split: str) -> None:
    """Warns if all images are of one class although the network has more."""
    if len(examples) > 1 and num_classes > 1 and len(examples.labels.unique()) == 1:
        rank_zero_warn(
            f"All {len(examples)} measured images of split {split} are of class "
            f"{int(examples.labels[0])} although the network has {num_classes} classes. If the "
            "data are sorted by class, raise `num_examples` or pass a shuffled `dataset=`."
        )


def warn_of_features(examples: Examples, logits: Tensor, split: str) -> None:
    """Warns if all first predictions are beyond the labels, of which there are far fewer."""
    largest, outputs = int(examples.labels.max()), logits.shape[1]
    if (
        len(examples) >= FEW
        and outputs > 2 * (largest + 1)
        and int(logits.argmax(dim=1).min()) > largest
    ):
        rank_zero_warn(
            f"The network has {outputs} outputs and predicts none of the classes 0 to {largest} of "
            f"the {len(examples)} measured images of split {split}: `forward` has to return "
            "logits, not features. If the data are sorted by class, raise `num_examples`."
        )


def _check_alike(trainer: Trainer, examples: Examples) -> None:
    """Raises if processes have read different images."""
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        digests: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(digests, _digest(examples))
        other = next((rank for rank, own in enumerate(digests) if own != digests[0]), None)
        if other is not None:
            raise ValueError(
                f"Expected all ranks to measure the same images but those of rank {other} are not "
                "those of rank 0; pass `dataset=`."
            )


def _has_split_dataset(trainer: Trainer, split: str) -> bool:
    source = source_of(trainer, split).instance
    method: Any = getattr(source, "split_dataset", None)
    # A method of this name that takes something else serves something else.
    if not isinstance(source, LightningDataModule) or not takes(method, split):
        return False
    return "split" in signature(method).parameters or not takes(method)


def _split_dataset(trainer: Trainer, split: str) -> Dataset[Any]:
    """What `split_dataset(split)` of the datamodule returns, checked."""
    datamodule: Any = source_of(trainer, split).instance
    try:
        dataset: Dataset[Any] = datamodule.split_dataset(split)
        if hasattr(dataset, "__getitem__"):
            return dataset
        came = type(dataset).__name__
    except (AttributeError, LookupError, TypeError) as error:
        came = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"Expected `split_dataset` of {type(datamodule).__name__} to return the dataset of a "
        f"split, but for {split} got {came}; rename it if it serves another purpose, or pass "
        "`dataset=`."
    )


def channels(normalization: Normalization) -> list[Tensor]:
    """Mean and standard deviation, `(C, 1, 1)` each, float64."""
    mean, std = (torch.tensor(list(v), dtype=torch.float64).view(-1, 1, 1) for v in normalization)
    # A number that is finite and above 0 in float64 may not be so in the precision of the images.
    means, stds = mean.float(), std.float()
    if mean.shape != std.shape or not (means.isfinite() & stds.isfinite() & (stds > 0)).all():
        raise ValueError(
            "Expected `normalization` to be (mean, std), a finite number and one > 0 for each "
            f"channel, but got {normalization}."
        )
    return [mean, std]


def check_normalized(images: Tensor, normalization: Normalization) -> None:
    """Raises a Refusal if images are pixels in [0, 1] already, although they should be normalized.

    Normalized images have pixels below a mean > 0. Those of a few pale images need not, so what has
    little contrast passes.
    """
    low, high = images.min().item(), images.max().item()
    if low >= 0 and low + 0.5 < high <= 1 and (channels(normalization)[0] > 0).any():
        raise Refusal(
            "Expected `normalization` to be (mean, std) that was applied to the images, or None, "
            f"but got {normalization} with images in [{low:.3g}, {high:.3g}], which look like "
            "pixels in [0, 1] already."
        )


def _digest(examples: Examples | Delivery) -> list[str]:
    parts = (examples.images, examples.labels)
    return [hashlib.sha256(part.contiguous().numpy().data).hexdigest() for part in parts]


def _read_items(dataset: Dataset[Any], count: int) -> tuple[Tensor, Tensor]:
    """The first images and labels of a dataset, in order, on the CPU."""
    size = min(count, len(dataset)) if isinstance(dataset, Sized) else count
    if size == 0:
        raise ValueError("Expected `dataset` to have images but got an empty one.")
    # Random transforms give the same images in every run.
    seed_all(0)
    try:
        items = [dataset[i] for i in range(size)]
        images = torch.stack([item[0] for item in items]).cpu()
        labels = torch.stack([torch.as_tensor(item[1]).cpu() for item in items])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "Expected `dataset` to have items that begin with an image tensor, all of one shape, "
            f"and a label, but got {type(dataset).__name__} ({error})."
        ) from error
    third = [item[2] for item in items if isinstance(item, (list, tuple)) and len(item) > 2]
    check_no_indices(labels, third)
    return images, labels


def _class_indices(labels: Tensor) -> Tensor:
    """Labels `(N,)` from `(N,)` or `(N, 1)`; several or soft labels of an image are an error."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    whole = not labels.is_complex() and torch.equal(labels, labels.long().to(labels))
    if labels.ndim == 1 and whole:
        return labels.long()
    came = f"{labels.dtype} of shape {tuple(labels.shape)}" + ("" if whole else " with fractions")
    raise ValueError(
        f"Expected `labels` to be one class index for each image, of shape (N,) or (N, 1), but got "
        f"{came}; soft and multiple labels have no robust error, pass `dataset=` with class "
        "indices."
    )
