"""What the datamodules share: splits, data on the device, augmentation, and one order for all."""

from abc import ABC, abstractmethod
from typing import Any, cast, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from robust_flatness.datamodules.augmentation import Augment, Augmentation
from robust_flatness.datamodules.evaluation_images import EvaluationImages
from robust_flatness.datamodules.global_batches import GlobalBatches, epochs_trained
from robust_flatness.datamodules.labelled_images import LabelledImages, to_unit_range
from robust_flatness.datamodules.mixed_batches import check_share
from robust_flatness.datamodules.reading import check_images, read_splits
from robust_flatness.datamodules.resident import ResidentImages
from robust_flatness.datamodules.splits import Splits, SplitSizes, ValFrom, make_splits
from robust_flatness.datamodules.training_loader import training_loader
from robust_flatness.datamodules.unlabeled_files import read_unlabeled
from robust_flatness.functional.checks import (
    Eps,
    check_choice,
    check_count,
    check_number,
    errors_on_all_ranks,
)


class RobustDataModule(LightningDataModule, ABC):
    """Images for adversarial training, and fixed images to measure robustness and flatness on.

    Batches are `(images, labels)` with float images `(N, C, H, W)` in [0, 1], not normalised, or
    `(images, labels, unlabeled)` where `unlabeled_share` mixes in pseudo-labelled images.
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
        eps: radius of the ball that measures use on these images, in pixels of [0, 1]; measures in
            L-infinity refuse more than 1 before anything is trained.
        batch_size: images in a global batch, shared among the processes.
        augment: `"none"`; `"flip_crop"`, which pads by an eighth of the side (4 pixels at 32);
            `"autoaugment"`, which adds AutoAugment and Cutout; `"autoaugment_batch"`, with one
            sub-policy for a global batch, which is faster. See `Augmentation`.
        flip: whether augmentation flips images.
        unlabeled: pseudo-labelled images, as `read_unlabeled` takes them: the pickle of Carmon et
            al., an `.npz`, or a folder; read only where `unlabeled_share` is above 0.
        unlabeled_share: share of them in each global batch. Above 0, batches have a third part,
            `unlabeled` `(N,)`, True where a label is a pseudo-label. See `MixedSampler`.
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
        ValueError: if a number is out of range, or `augment` or `val_from` is unknown.

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
        augment: Augment = "flip_crop",
        flip: bool = True,
        unlabeled: str | None = None,
        unlabeled_share: float = 0.0,
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
        check_number("eps", eps)
        check_count("batch_size", batch_size, low=1)
        check_count("num_workers", num_workers)
        check_choice("augment", augment, get_args(Augment))
        check_share(unlabeled_share, batch_size)
        self.eps = float(eps)
        self.batch_size = batch_size
        self.augment = augment
        self.flip = flip
        self.unlabeled = unlabeled
        self.unlabeled_share = unlabeled_share
        self.sizes = SplitSizes(num_train, num_train_eval, num_val, num_test, val_from)
        self.in_memory = in_memory
        self.num_workers = num_workers
        self.seed = seed
        self._run_seed: int | None = None
        self._augmentation = Augmentation("none")
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

    def unlabeled_source(self) -> LabelledImages:
        """Return the pseudo-labelled images, where `unlabeled_share` is above 0.

        Raises:
            ValueError: if `unlabeled` is `None`, or no file or folder that can be read.
        """
        names = getattr(self, "class_names", None)
        return read_unlabeled(self.unlabeled, num_classes=self.num_classes, class_names=names)

    def setup(self, stage: str | None = None) -> None:
        """Read and check the images once, and bring those to train on to the device.

        Args:
            stage: `"fit"` where a trainer is about to train; anything else only reads.

        Raises:
            ValueError: if the images do not fit the splits, the classes, the channels, the batch
                size, the augmentation, or each other.
        """
        if stage != "fit" or self.trainer is None:
            self._read_once(with_val=stage != "test")
            return
        with errors_on_all_ranks():
            self._read_once()
            if self.unlabeled_share and "unlabeled" not in self._images:
                self._read_unlabeled()
        strategy = self.trainer.strategy
        seed = torch.initial_seed() if self.seed is None else self.seed
        self._run_seed = int(strategy.broadcast(seed))
        self._global_batches().check(len(self._images["training"]))
        mean = self.mean if Augmentation.needs_mean(self.augment) else ()
        self._augmentation = Augmentation(self.augment, self.flip, mean)
        for name, images in self._images.items():
            if name in ("training", "unlabeled") and self.in_memory:
                self._images[name] = cast(ResidentImages, images).to(strategy.root_device)

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
        if not self._images or (split == "val" and not self._splits.val):
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
        """Return this process's share of the shuffled global batches.

        The last batch of an epoch has the images that remain, up to what cannot be shared evenly.

        Raises:
            RuntimeError: if there is no trainer to share batches among the processes of.
        """
        trainer = self._attached_trainer()
        return training_loader(
            self._images["training"],
            self._images.get("unlabeled"),
            self.unlabeled_share,
            batches=self._global_batches(),
            epoch=epochs_trained(trainer),
            num_workers=0 if self.in_memory else self.num_workers,
            pin_memory=not self.in_memory and trainer.strategy.root_device.type == "cuda",
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the `test` split in order, as float images."""
        return DataLoader(self.split_dataset("test"), self.batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn 8 bits into floats in [0, 1], and augment while training.

        Args:
            batch: images `(N, C, H, W)`, labels `(N,)` and what may follow, on the device. What
                does not begin with images of 8 bits comes from another loader and is returned as
                it is.
            dataloader_idx: not used.

        Returns:
            Images, float32 or what the trainer's precision asks for, and the rest as it is.
        """
        images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            return batch
        trainer = self._attached_trainer()
        if trainer.training:
            # The trainer counts a batch only after its transfer.
            stands = (epochs_trained(trainer), trainer.fit_loop.batch_idx + 1)
            noise = self._augmentation.noise(self._global_batches(), len(images), *stands)
            images = self._augmentation(images, noise)
        # The trainer converts floats to its precision before this hook: these are made in it.
        return trainer.precision_plugin.convert_input(to_unit_range(images)), *batch[1:]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the seed, so that a resumed run shuffles as before."""
        return {"seed": self._run_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that goes on, unless one was given."""
        if self.seed is None:
            self._run_seed = state_dict["seed"]

    def _read_once(self, *, with_val: bool = True) -> None:
        """Read the splits into memory, or remember where their images are.

        Args:
            with_val: whether there must be images for early stopping, which a test does not need.
        """
        if self._images and (self._splits.val or not with_val):
            return
        train, test = self.sources()
        self._check(train, name="training")
        self._check(test, name="test")
        orders = self.orders(len(train), len(test))
        splits = make_splits(*orders, self.sizes, with_val=with_val)
        self._images = read_splits(
            train, test, splits, val_from=self.sizes.val_from, in_memory=self.in_memory
        )
        self._splits = splits

    def _read_unlabeled(self) -> None:
        """Read the pseudo-labelled images as the others, or remember where they are."""
        images = self.unlabeled_source()
        self._check(images, name="unlabeled", like=self._images["training"])
        self._images["unlabeled"] = ResidentImages.load(images) if self.in_memory else images

    def _check(self, images: LabelledImages, name: str, like: LabelledImages | None = None) -> None:
        classes, channels = self.num_classes, self.in_channels
        check_images(images, name=name, num_classes=classes, in_channels=channels, like=like)

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
