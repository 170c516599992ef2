"""Any images that are sorted into folders, one a class."""

from functools import cached_property
from pathlib import Path
from typing import Any

from robust_flatness.datamodules.class_folders import (
    ClassFolders,
    class_folders,
    labels_by_name,
)
from robust_flatness.datamodules.computed_statistics import ComputedStatistics
from robust_flatness.datamodules.images import LabelledImages
from robust_flatness.datamodules.splits import fixed_permutation
from robust_flatness.networks import Normalize


class ImageFolder(ComputedStatistics):
    """Images in `root/train/<class>/` and `root/test/<class>/`, at any depth, read as RGB.

    Pixels have 8 bits; gray images of 16 bits are rounded to them. Floats, integers of more bits,
    images that are partly transparent and animations are refused, as their pixels in [0, 1] are
    not known. Hidden files and folders are skipped, links are followed, and files that are no
    images by their names are counted in a warning.

    Classes are numbered in the order of their names. Since files come sorted by class, the splits
    follow a permutation that never changes; so `num_train` takes images of all classes.

    Args:
        root: the folder with `train` and `test`; `~` is your home.
        mean: mean of each channel; `None` to compute it from the training images.
        std: standard deviation of each channel; `None` to compute it likewise.
        **kwargs: the arguments of `~robust_flatness.datamodules.RobustDataModule`.

    Raises:
        ValueError: as in the base class; and, when the images are first needed, if folders are
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
        for name, given in (("mean", mean), ("std", std)):
            if given is not None and len(given) != self.in_channels:
                raise ValueError(f"Expected `{name}` to have 3 values but got {given}.")
        Normalize(mean or [0.0] * self.in_channels, std or [1.0] * self.in_channels)  # checks them
        self.root = Path(root).expanduser()
        if mean is not None:
            self.mean = mean
        if std is not None:
            self.std = std

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, sorted: the folders in `root/train`."""
        names = class_folders(self.root / "train")
        others = class_folders(self.root / "test")
        if names != others:
            missing = sorted(set(names) ^ set(others))
            raise ValueError(
                f"Expected the same classes in {self.root}/train and {self.root}/test"
                f" but got {missing[0]!r} in one of them only."
            )
        return names

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of folders in `root/train`."""
        return len(self.class_names)

    def sources(self) -> tuple[LabelledImages, LabelledImages]:
        """Return the files of both folders, sorted by class and name."""
        folders, labels = ClassFolders(), labels_by_name(self.class_names)
        train = folders.read(self.root / "train", labels)
        test = folders.read(self.root / "test", labels, train.size)
        folders.report()
        return train, test

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Return permutations that depend on the number of files alone."""
        return fixed_permutation(num_train), fixed_permutation(num_test)
