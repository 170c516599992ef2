"""Base class of the datamodules: splits, images on the device, augmentation, global batches."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, cast, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_convert

from robust_flatness.datamodules.augmentation import FILLED, Augment, Augmentation
from robust_flatness.datamodules.batches import GlobalBatches, MixedImages, MixedSampler
from robust_flatness.datamodules.images import (
    EvaluationImages,
    LabeledImages,
    ResidentImages,
    SplitSizes,
    ValFrom,
    channel_statistics,
    make_splits,
    to_unit_range,
)
from robust_flatness.datamodules.unlabeled_files import read_unlabeled
from robust_flatness.functional.batch_noise import agreed_seed
from robust_flatness.functional.checks import (
    Eps,
    check_choice,
    check_count,
    check_number,
    errors_on_all_ranks,
)


class RobustDataModule(LightningDataModule, ABC):
    """Images for adversarial training, and fixed images to measure robustness and flatness on.

    Batches are `(images, labels)` with float images `(N, C, H, W)` in [0, 1], not normalized, or
    `(images, labels, unlabeled)` if `unlabeled_share` mixes in pseudo-labeled images. A subclass
    sets `num_classes` and `in_channels`, may set `mean` and `std`, and returns the images in
    `sources`; `orders` may return the order in which they count.

    Training images are in memory with 8 bits per channel, on the device that trains, and are
    augmented there a whole batch at a time. Shuffling and augmentation depend on seed, epoch and
    batch alone and are drawn for the global batch: any number of processes sees the same images,
    and so does a run that resumes at the end of an epoch.

    The splits are `train`, the first 1000 training images without augmentation, `val`, the
    last 500 test images, and `test`, the first 1000 test images. So the paper's early stopping
    selects on **test** images; `val_from="train"` avoids it.

    Args:
        eps: Radius of the attack of measures, in pixels of [0, 1]; measures in L-infinity refuse
            more than 1 before training. `AT` has its own `eps`; `--eps` sets both.
        batch_size: Images in a global batch, shared among the processes.
        augment: `"none"`; `"flip"`; `"flip_crop"`, which pads by an eighth of the side (4 pixels at
            32); `"autoaugment"`, which adds AutoAugment and Cutout; `"autoaugment_batch"`, with one
            sub-policy per global batch, which is faster. See `Augmentation`.
        flip: Whether augmentation flips images.
        downsample: Side of the blocks of pixels that are averaged, so that 2 halves the resolution;
            means are rounded to 8 bits. Above 1 it needs `in_memory`.
        unlabeled: Pseudo-labeled images, see `read_unlabeled`: the pickle of Carmon et al., an
            `.npz`, or a folder; read only if `unlabeled_share` is above 0. `"unused"` takes the
            training images that no split has, with their labels, as if by a perfect teacher.
        unlabeled_share: Share of them in each global batch. Above 0, batches have a third part,
            `unlabeled` `(N,)`, True if a label is a pseudo-label. See `MixedSampler`.
        num_train: Number of images to train on, the first ones; `None` for all.
        num_train_eval: Number of images of `train`, or all if there are fewer.
        num_val: Number of images of `val`.
        num_test: Number of images of `test`.
        val_from: `"test"`, or `"train"` to take `val` from the end of the training images.
        in_memory: Whether training images are kept on the device; if not, they are read when
            needed.
        num_workers: Processes that read images if `in_memory` is false, else unused.
        seed: Seed of shuffling and augmentation; `None` for PyTorch's global seed.

    Attributes:
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Raises:
        ValueError: If a number is out of range, or `augment` or `val_from` is unknown.

    Example:
        >>> class Noise(RobustDataModule):
        ...     num_classes, in_channels = 2, 1
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

    def __init__(
        self,
        *,
        eps: Eps = 8 / 255,
        batch_size: int = 128,
        augment: Augment = "flip_crop",
        flip: bool = True,
        downsample: int = 1,
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
        check_count("downsample", downsample, low=1)
        if downsample > 1 and not in_memory:
            raise ValueError(
                f"Expected `downsample` to be 1 if `in_memory` is false but got {downsample}."
            )
        check_choice("augment", augment, get_args(Augment))
        check_number("unlabeled_share", unlabeled_share, high=1)
        if 0 < unlabeled_share < 1 and not 0 < round(unlabeled_share * batch_size) < batch_size:
            raise ValueError(
                f"Expected `unlabeled_share` to give each batch of {batch_size} images of both"
                f" kinds but got {unlabeled_share}."
            )
        self.eps = float(eps)
        self.batch_size = batch_size
        self.augment = augment
        self.flip = flip
        self.downsample = downsample
        self.unlabeled = unlabeled
        self.unlabeled_share = unlabeled_share
        self.sizes = SplitSizes(num_train, num_train_eval, num_val, num_test, val_from)
        self.in_memory = in_memory
        self.num_workers = num_workers
        self.seed = seed
        self._run_seed: int | None = None
        self._augmentation = Augmentation("none")
        # By split: positions of the images, and the images once they are read.
        self._splits: dict[str, list[int]] = {}
        self._images: dict[str, LabeledImages] = {}

    @abstractmethod
    def sources(self) -> tuple[LabeledImages, LabeledImages]:
        """Returns all training and all test images, in the order of the data set itself."""

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Returns the order in which `num_train` training and `num_test` test images count.

        Splits are the first and the last images of these lists, by default in the order of the
        sources. The order must depend neither on the run nor on its seed.
        """
        return list(range(num_train)), list(range(num_test))

    def unlabeled_source(self) -> LabeledImages:
        """Returns the pseudo-labeled images if `unlabeled_share` is above 0.

        Raises:
            ValueError: If `unlabeled` is `None`, or not a file or folder that can be read, or if it
                is `"unused"` and the splits have all training images.
        """
        if self.unlabeled == "unused":
            return self._unused_images()
        names = getattr(self, "class_names", None)
        return read_unlabeled(self.unlabeled, num_classes=self.num_classes, class_names=names)

    def _unused_images(self) -> LabeledImages:
        train, test = self.sources()
        order, _ = self.orders(len(train), len(test))
        if not self._images:
            self.setup()
        used = set(self._splits["training"])
        if self.sizes.val_from == "train":
            used.update(self._splits["val"])
        unused = [index for index in order if index not in used]
        if not unused:
            raise ValueError(
                f"Expected `num_train` to leave some of {len(order)} training images for "
                f"`unlabeled` 'unused' but got {self.sizes.num_train}."
            )
        return train.subset(unused)

    @cached_property
    def mean(self) -> list[float]:
        """Mean of each channel in [0, 1], computed from the images to train on if not set."""
        return self._statistics[0]

    @cached_property
    def std(self) -> list[float]:
        """Standard deviation of each channel, computed from the images to train on if not set."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        self.setup()
        return channel_statistics(self._images["training"])

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the images once, and moves those to train on to the device.

        Args:
            stage: `"fit"` if a trainer is about to train; other stages only read.

        Raises:
            ValueError: If the images do not fit the splits, the classes, the channels, the batch
                size, the augmentation, or each other.
        """
        if stage != "fit" or self.trainer is None:
            self._read(with_val=stage != "test")
            return
        with errors_on_all_ranks():
            self._read(with_val=True)
            if self.unlabeled_share and "unlabeled" not in self._images:
                unlabeled = self._load(self.unlabeled_source())
                self._check_images(unlabeled, "unlabeled", like=self._images["training"])
                self._images["unlabeled"] = unlabeled
        self._run_seed = agreed_seed(self.trainer, self.seed)
        self._global_batches().check(len(self._images["training"]))
        mean = self.mean if self.augment in FILLED else ()
        self._augmentation = Augmentation(self.augment, self.flip, mean)
        for name, images in self._images.items():
            if name in ("training", "unlabeled") and self.in_memory:
                self._images[name] = cast(ResidentImages, images).to(
                    self.trainer.strategy.root_device
                )

    def split_dataset(self, split: str) -> EvaluationImages:
        """Returns the images of a split, always in the same order; no trainer is needed.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Returns:
            A data set of pairs of an image `(C, H, W)`, float32 in [0, 1], and its label.

        Raises:
            ValueError: If `split` is another one.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f"Expected `split` to be 'train', 'val' or 'test' but got {split!r}.")
        if split not in self._images:
            self.setup()
        return EvaluationImages(self._images[split])

    def split_indices(self) -> dict[str, list[int]]:
        """Returns the positions of each split's images in the data set's own order.

        `train` counts in the training set and `test` in the test set; `val` counts in the
        set of `val_from`.
        """
        if not self._images:
            self.setup()
        return {name: list(self._splits[name]) for name in ("train", "val", "test")}

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns this process's share of the shuffled global batches, as uint8 images.

        The last batch of an epoch has the images that remain and can be shared evenly.

        Raises:
            RuntimeError: If there is no trainer whose processes share the batches.
        """
        batches, root_device = self._global_batches(), self._attached_trainer.strategy.root_device
        dataset: Dataset[Any] = self._images["training"]
        # Workers fetch as soon as there is an iterator, which on resume is before the trainer sets
        # the sampler's epoch.
        sampler: DistributedSampler[Any] = batches.sampler(self._images["training"], self._epoch)
        if "unlabeled" in self._images:
            dataset = MixedImages(self._images["training"], self._images["unlabeled"])
            sampler = MixedSampler(dataset, batches, self.unlabeled_share)
            sampler.set_epoch(self._epoch)
        num_workers = 0 if self.in_memory else self.num_workers
        return DataLoader(
            dataset,
            batches.batch_size // batches.world_size,
            sampler=sampler,
            collate_fn=default_convert,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=not self.in_memory and root_device.type == "cuda",
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the `test` split in order, as float images."""
        return DataLoader(self.split_dataset("test"), self.batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Converts uint8 images to floats in [0, 1], and augments them in training.

        Batches that do not begin with uint8 images are from other loaders and returned as they are.
        Images become float32, or of the trainer's precision.
        """
        images = batch[0] if isinstance(batch, (list, tuple)) and batch else None
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            return batch
        trainer = self._attached_trainer
        if trainer.training:
            # The trainer counts a batch only after its transfer.
            batch_idx = trainer.fit_loop.batch_idx + 1
            batches = self._global_batches()
            noise = self._augmentation.noise(batches, len(images), self._epoch, batch_idx)
            images = self._augmentation(images, noise)
        # The trainer converts floats to its precision before this hook, but not these.
        return trainer.precision_plugin.convert_input(to_unit_range(images)), *batch[1:]

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed, so that a resumed run shuffles as before."""
        return {"seed": self._run_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the seed of the resumed run, unless `seed` is set."""
        if self.seed is None:
            self._run_seed = state_dict["seed"]

    def _read(self, *, with_val: bool) -> None:
        """Reads the splits, or only checks them if not `in_memory`; a test needs no `val`."""
        if self._images and ("val" in self._images or not with_val):
            return
        train, test = self.sources()
        self._check_images(train, "training")
        self._check_images(test, "test")
        splits = make_splits(*self.orders(len(train), len(test)), self.sizes, with_val=with_val)
        val = test if self.sizes.val_from == "test" else train
        sources = {"training": train, "test": test} | ({"val": val} if splits["val"] else {})
        measured = {k: self._load(source.subset(splits[k])) for k, source in sources.items()}
        training = measured.pop("training")
        measured["train"] = training.subset(range(len(splits["train"])))
        if not self.in_memory:
            # Damaged images raise their error now, and not when they are first measured.
            for images in measured.values():
                for positions in torch.arange(len(images)).split(100):
                    images.__getitems__(positions.tolist())
        self._images, self._splits = {"training": training, **measured}, splits

    def _load(self, images: LabeledImages) -> LabeledImages:
        if not self.in_memory:
            return images
        return ResidentImages.load(images).downsampled(self.downsample)

    def _check_images(
        self, images: LabeledImages, name: str, like: LabeledImages | None = None
    ) -> None:
        """Checks number, labels and channels of images, and that their size is that of `like`."""
        if not len(images):
            raise ValueError(f"Expected at least 1 {name} image but got none.")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"Expected labels of {name} images in 0 to {self.num_classes - 1}"
                f" but got labels in {low} to {high}."
            )
        channels, *size = images[0][0].shape
        if channels != self.in_channels:
            raise ValueError(
                f"Expected {name} images of {self.in_channels} channels but got {channels}"
                " channels."
            )
        if like is not None and size != (expected := list(like[0][0].shape[1:])):
            raise ValueError(
                f"Expected {name} images of {expected[1]}x{expected[0]} pixels, as the labeled ones"
                f" have, but got {size[1]}x{size[0]}."
            )

    @property
    def _attached_trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("Expected a trainer that uses the datamodule but got none.")
        return self.trainer

    @property
    def _epoch(self) -> int:
        """The number of trained epochs, also while a resumed trainer has not counted on yet."""
        return int(self._attached_trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    def _global_batches(self) -> GlobalBatches:
        trainer = self._attached_trainer
        if self._run_seed is None:
            raise RuntimeError("Expected `setup('fit')` before training batches but got no call.")
        return GlobalBatches(
            self.batch_size, trainer.world_size, trainer.global_rank, self._run_seed
        )
