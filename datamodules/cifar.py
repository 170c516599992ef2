"""CIFAR-10, the data set of the paper's numbers, and CIFAR-100."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision import datasets

from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.images import LabeledImages, ResidentImages


class CIFAR10(RobustDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels in 10 classes, downloaded once.

    Splits are in torchvision's order, as in the paper: `test` is test images 0 to 999, `val`
    is test images 9,500 to 9,999 and `train` is training images 0 to 999.

    Args:
        root: Folder with the data set, or to download it to; `~` is the home folder.
        **kwargs: Arguments of `RobustDataModule`.

    Example:
        >>> cifar = CIFAR10(root="data", batch_size=256)
        >>> cifar.num_classes, cifar.in_channels, cifar.mean
        (10, 3, [0.4914, 0.4822, 0.4465])
    """

    num_classes = 10
    in_channels = 3
    mean = [0.4914, 0.4822, 0.4465]
    std = [0.2470, 0.2435, 0.2616]
    dataset: ClassVar[Any] = datasets.CIFAR10

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Downloads the data set unless it is there; called on one process only.

        Raises:
            PermissionError: If `root` cannot be written.
            ConnectionError: If the download fails.
        """
        try:
            self.dataset(self.root, download=True)
        except PermissionError as error:
            raise PermissionError(
                f"Expected `root` to be a folder that can be written but got {self.root}: {error}."
            ) from error
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"Expected to download {self.dataset.__name__} to `root` {self.root} but got"
                f" {error!r}; download it on a machine with a network and copy its folder"
                f" {self.dataset.base_folder} into `root`."
            ) from error

    def sources(self) -> tuple[LabeledImages, LabeledImages]:
        """Returns the training and the test images in torchvision's order.

        Raises:
            RuntimeError: If there is no complete copy in `root`.
        """
        return self._read_images(train=True), self._read_images(train=False)

    def _read_images(self, *, train: bool) -> ResidentImages:
        try:
            data = self.dataset(self.root, train=train)
        except RuntimeError as error:
            raise RuntimeError(
                f"Expected all of {self.dataset.__name__} in `root` {self.root} but files are"
                " missing or damaged; call `prepare_data()` to download it."
            ) from error
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ResidentImages(pixels, torch.tensor(data.targets))


class CIFAR100(CIFAR10):
    """50,000 training and 10,000 test images of 32x32 pixels in 100 classes, downloaded once.

    Args:
        root: Folder with the data set, or to download it to; `~` is the home folder.
        **kwargs: Arguments of `RobustDataModule`.
    """

    num_classes = 100
    mean = [0.5071, 0.4865, 0.4409]
    std = [0.2673, 0.2564, 0.2762]
    dataset: ClassVar[Any] = datasets.CIFAR100
