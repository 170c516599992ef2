"""What the datamodules share: splits, data on the device, augmentation, and one order for all."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from robust_flatness.configs.types import Eps
from robust_flatness.datamodules.augment import random_flip_and_crop
from robust_flatness.datamodules.evaluation_images import EvaluationImages
from robust_flatness.datamodules.global_batches import GlobalBatches
from robust_flatness.datamodules.labelled_images import LabelledImages, keep_batch, to_unit_range
from robust_flatness.datamodules.reading import check_images, read_splits
from robust_flatness.datamodules.resident import ResidentImages
from robust_flatness.datamodules.splits import Splits, SplitSizes, ValFrom, make_splits


class RobustDataModule(LightningDataModule, ABC):
    """Images for adversarial training, and fixed images to measure robustness and flatness on.

    Batches are `(images, labels)` with float images `(N, C, H, W)` in [0, 1], not normalised.
    A subclass sets `num_classes`, `in_channels`, `mean` and `std` and says in
    `sources` where the images are; `orders` may say in which order they count.

    Training images lie in memory as 8 bits a pixel, on the device that trains, and are augmented
    there a whole batch at a time. Shuffling and augmentation depend on seed, epoch and batch alone
    and are drawn for the global batch: any number of processes sees the same images, and so does a
    run that resumes at the end of an epoch.

    The splits are `train`, the first 1000 training images without augmentation, `val`, the
    last 500 test images, and `test`, the first 1000 test images. So the paper's early stopping
    selects on **test** images; `val_from="train"` avoids it.

    Args:
        eps: radius of the L-infinity ball that measures use on these images, in pixels of [0, 1].
        batch_size: images in a global batch, shared among the processes.
        augment: whether training images are flipped, and cropped after padding by 4 pixels.
        num_train: number of images to train on, the first ones; `None` for all.
        num_train_eval: number of images of `train`, or all there are if fewer.
        num_val: number of images of `val`.
        num_test: number of images of `test`.
        val_from: `"test"`, or `"train"` to take `val` from the end of the training images.
        in_memory: whether images are held on the device; if not, they are read when needed.
        num_workers: processes that read images when `in_memory` is false, else unused.
        seed: seed of shuffling and augmentation; `None` for PyTorch's global seed.

    Attributes:
        num_classes: number of classes.
        in_channels: channels of the images.
        mean: mean of each channel over the training images.
        std: standard deviation of each channel over the training images.

    Raises:
        ValueError: if a number is out of range or `val_from` is unknown.

    Example:
        >>> class Noise(RobustDataModule):
        ...     num_classes, in_channels, mean, std = 2, 1, [0.5], [0.3]
        ...     def sources(self):
        ...         images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
        ...         half = ResidentImages(images, torch.arange(20) % 2)
        ...         return half, half
        >>> image, label = Noise(num_val=5, num_test=5).split_dataset("val")[0]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), 1)
    """

    num_classes: int
    in_channels: int
    mean: list[float]
    std: list[float]

    def __init__(
        self,
        *,
        eps: Eps = 8 / 255,
        batch_size: int = 128,
        augment: bool = True,
        num_train: int | None = None,
        num_train_eval: int = 1000,
        num_val: int = 500,
        num_test: int = 1000,
        val_from: ValFrom = "test",
        in_memory: bool = True,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("eps", eps, 0),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            # Turned round, so that NaN is refused as well.
            if not value >= least:
                raise ValueError(f"Expected `{name}` to be >= {least} but got {value}.")
        self.eps = float(eps)
        self.batch_size = batch_size
        self.augment = augment
        self.sizes = SplitSizes(num_train, num_train_eval, num_val, num_test, val_from)
        self.in_memory = in_memory
        self.num_workers = num_workers
        self.seed = seed
        self._run_seed: int | None = None
        self._splits = Splits([], [], [], [])
        self._images: dict[str, LabelledImages] = {}

    @abstractmethod
    def sources(self) -> tuple[LabelledImages, LabelledImages]:
        """Return all training and all test images, in the order of the data set itself."""

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Return the order in which `num_train` training and `num_test` test images count.

        Splits are the first and the last images of these lists. By default it is the order of the
        sources. It must depend neither on the run nor on its seed.
        """
        return list(range(num_train)), list(range(num_test))

    def setup(self, stage: str | None = None) -> None:
        """Read and check the images once, and bring those to train on to the device.

        Args:
            stage: `"fit"` where a trainer is about to train; anything else only reads.

        Raises:
            ValueError: if the images do not fit the splits, the classes, the channels, or the
                batch size.
        """
        if not self._images:
            self._read()
        if stage != "fit" or self.trainer is None:
            return
        strategy = self.trainer.strategy
        seed = torch.initial_seed() if self.seed is None else self.seed
        self._run_seed = int(strategy.broadcast(seed))
        training = self._images["training"]
        self._global_batches().check(len(training))
        if self.in_memory and isinstance(training, ResidentImages):
            self._images["training"] = training.to(strategy.root_device)

    def split_dataset(self, split: str) -> EvaluationImages:
        """Return the images of a split, always in the same order; no trainer is needed.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Returns:
            A dataset of pairs of an image `(C, H, W)`, float32 in [0, 1], and its label.

        Raises:
            ValueError: if there is no such split.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f"Expected `split` to be 'train', 'val' or 'test' but got {split!r}.")
        if not self._images:
            self.setup()
        return EvaluationImages(self._images[split])

    def split_indices(self) -> dict[str, list[int]]:
        """Return the positions of each split's images in the data set's own order.

        `train` counts in the training set and `test` in the test set; `val` counts in the
        one that `val_from` names.
        """
        if not self._images:
            self.setup()
        return {name: list(getattr(self._splits, name)) for name in ("train", "val", "test")}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the shuffled global batches, without an uneven last one.

        Raises:
            RuntimeError: if there is no trainer to share batches among the processes of.
        """
        trainer = self._attached_trainer()
        dataset, batches = self._images["training"], self._global_batches()
        workers = 0 if self.in_memory else self.num_workers
        return DataLoader(
            dataset,
            batches.local_size,
            # Workers fetch as soon as there is an iterator, which on resume is before the trainer
            # tells the sampler its epoch.
            sampler=batches.sampler(dataset, _epoch(trainer)),
            collate_fn=keep_batch,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=not self.in_memory and trainer.strategy.root_device.type == "cuda",
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the `test` split in order, as float images."""
        return DataLoader(self.split_dataset("test"), self.batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn 8 bits into floats in [0, 1], and augment while training.

        Args:
            batch: images `(N, C, H, W)` and labels `(N,)`, on the device. What does not begin
                with images of 8 bits comes from another loader and is returned as it is.
            dataloader_idx: not used.

        Returns:
            Images, float32 or what the trainer's precision asks for, and labels.
        """
        images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            return batch
        trainer = self._attached_trainer()
        if self.augment and trainer.training:
            # The trainer counts a batch only after its transfer.
            index = trainer.fit_loop.batch_idx + 1
            noise = self._global_batches().noise(len(images), _epoch(trainer), index)
            images = random_flip_and_crop(images, noise.to(images.device, non_blocking=True))
        # The trainer converts floats to its precision before this hook: these are made in it.
        return trainer.precision_plugin.convert_input(to_unit_range(images)), *batch[1:]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the seed, so that a resumed run shuffles as before."""
        return {"seed": self._run_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that goes on, unless one was given."""
        if self.seed is None:
            self._run_seed = state_dict["seed"]

    def _read(self) -> None:
        """Read the splits into memory, or remember where their images are."""
        train, test = self.sources()
        for name, images in (("training", train), ("test", test)):
            check_images(
                images, name=name, num_classes=self.num_classes, in_channels=self.in_channels
            )
        splits = make_splits(*self.orders(len(train), len(test)), self.sizes)
        self._images = read_splits(
            train, test, splits, val_from=self.sizes.val_from, in_memory=self.in_memory
        )
        self._splits = splits

    def _attached_trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("Expected a trainer that uses the datamodule but got none.")
        return self.trainer

    def _global_batches(self) -> GlobalBatches:
        """Describe how the trainer's processes share the batches of this run."""
        trainer = self._attached_trainer()
        if self._run_seed is None:
            raise RuntimeError("Expected `setup('fit')` before training batches but got no call.")
        return GlobalBatches(
            self.batch_size, trainer.world_size, trainer.global_rank, self._run_seed
        )


def _epoch(trainer: Trainer) -> int:
    """Return the number of epochs trained, also where a resumed trainer has not yet counted on."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
