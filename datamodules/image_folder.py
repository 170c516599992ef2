"""Images of the user, in one folder per class."""

from functools import cached_property
from pathlib import Path
from typing import Any

from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.image_files import (
    class_folders,
    read_class_folders,
    warn_left_out,
)
from robust_flatness.datamodules.images import LabeledImages, fixed_permutation
from robust_flatness.networks import Normalize


class ImageFolder(RobustDataModule):
    """Images in `root/train/<class>/` and `root/test/<class>/`, at any depth, read as RGB.

    Pixels have 8 bits; gray images of 16 bits are rounded to them. Floats, integers of more bits,
    transparent images and animations are refused, because their pixels in [0, 1] are not known.
    Hidden files and folders are skipped, links are followed, and a warning counts the files that
    are not images by their names.

    Classes are numbered in the order of their names. Since files are sorted by class, the splits
    follow a fixed permutation; so `num_train` takes images of all classes.

    Args:
        root: Folder with `train` and `test`; `~` is the home folder.
        mean: Mean of each channel; `None` to compute it from the training images.
        std: Standard deviation of each channel; `None` to compute it from the training images.
        **kwargs: Arguments of `RobustDataModule`.

    Raises:
        ValueError: As in the base class; and, when the images are first needed, if folders are
            missing or empty, the classes of `train` and `test` differ, or an image is damaged
            or has another size.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for i, name in enumerate(["train/cat", "train/dog", "test/cat", "test/dog"]):
        ...         Path(root, name).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8), (i, 0, 9 * i)).save(Path(root, name, "0.png"))
        ...     folder = ImageFolder(root, num_val=1, num_test=1)
        ...     folder.num_classes, len(folder.split_dataset("train"))
        (2, 2)
    """

    in_channels = 3

    def __init__(
        self,
        root: str,
        *,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != self.in_channels:
                raise ValueError(f"Expected `{name}` to have 3 values but got {values}.")
        Normalize(mean or [0.0] * self.in_channels, std or [1.0] * self.in_channels)  # checks them
        self.root = Path(root).expanduser()
        if mean is not None:
            self.mean = mean
        if std is not None:
            self.std = std

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, sorted: the folders in `root/train`."""
        names, test_names = (class_folders(self.root / part) for part in ("train", "test"))
        if names != test_names:
            missing = sorted(set(names) ^ set(test_names))
            raise ValueError(
                f"Expected the same classes in {self.root}/train and {self.root}/test"
                f" but got {missing[0]!r} in one of them only."
            )
        return names

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of folders in `root/train`."""
        return len(self.class_names)

    def sources(self) -> tuple[LabeledImages, LabeledImages]:
        """Returns the files of both folders, sorted by class and path."""
        train, left_out = read_class_folders(self.root / "train", self.class_names)
        test, also = read_class_folders(self.root / "test", self.class_names, train.size)
        warn_left_out(left_out + also)
        return train, test

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Returns permutations that depend on the number of files alone."""
        return fixed_permutation(num_train), fixed_permutation(num_test)
