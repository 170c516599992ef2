"""The handwritten digits of scikit-learn, a data set without a download."""

from typing import Any, cast

import torch
from torch import Tensor

from robust_flatness.datamodules.augmentation import Augment
from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.images import (
    LabeledImages,
    ResidentImages,
    fixed_permutation,
    to_unit_range,
)
from robust_flatness.functional.checks import Eps, check_count

_NUM_IMAGES = 1797


class Digits(RobustDataModule):
    """1797 gray digits of 8x8 pixels in 10 classes, few enough to overfit within minutes.

    They have no test set, so a fixed permutation is divided into four parts: 300 training images,
    a pool of 397 for methods that use unlabeled images, 600 images of `test` and 500 of `val`. All
    of `split_indices` are positions in scikit-learn's order.

    If `unlabeled_share` is above 0 and `unlabeled` is `None`, batches mix in the pool, labeled by a
    support vector machine that was trained on the training images alone; `"unused"` mixes in the
    pool with its true labels.

    Args:
        eps: Radius of the ball that measures use on these images, in pixels of [0, 1].
        batch_size: Images in a global batch, shared among the processes.
        augment: As in `RobustDataModule`, but nothing by default.
        flip: Whether augmentation flips images; mirrored digits are not digits.
        num_train: Number of training images, the first ones of the permutation.
        num_pool: Number of images in the pool, after the training images.
        num_test: Number of images of `test`, before `val`.
        num_val: Number of images of `val`, the last ones.
        **kwargs: Other arguments of `RobustDataModule`.

    Raises:
        ValueError: If the splits need more images than there are, or as in the base class.

    Example:
        >>> digits = Digits()
        >>> image, label = digits.split_dataset("test")[0]
        >>> image.shape
        torch.Size([1, 8, 8])
        >>> {split: len(indices) for split, indices in digits.split_indices().items()}
        {'train': 300, 'val': 500, 'test': 600, 'pool': 397}
    """

    num_classes = 10
    in_channels = 1

    def __init__(
        self,
        *,
        eps: Eps = 0.2,
        batch_size: int = 64,
        augment: Augment = "none",
        flip: bool = False,
        num_train: int = 300,
        num_pool: int = 397,
        num_test: int = 600,
        num_val: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            eps=eps,
            batch_size=batch_size,
            augment=augment,
            flip=flip,
            num_test=num_test,
            num_val=num_val,
            **kwargs,
        )
        check_count("num_train", num_train, low=1)
        check_count("num_pool", num_pool)
        total = num_train + num_pool + num_test + num_val
        if total > _NUM_IMAGES:
            raise ValueError(
                "Expected `num_train`, `num_pool`, `num_test` and `num_val` to add up to at most"
                f" {_NUM_IMAGES} but got {total}."
            )
        self.num_train = num_train
        self.num_pool = num_pool

    @property
    def pool_indices(self) -> list[int]:
        """Positions of the images of the pool, which are in no split."""
        return fixed_permutation(_NUM_IMAGES)[self.num_train : self.num_train + self.num_pool]

    @property
    def teacher_accuracy(self) -> float:
        """Share of the pool's pseudo-labels that are right; for reports, not for training."""
        pool = self._pool()
        return (self._pseudo_labels(pool.images) == pool.labels).double().mean().item()

    def sources(self) -> tuple[LabeledImages, LabeledImages]:
        """Returns all digits twice, as the training and as the test images."""
        # Imported here because the import takes longer than reading the digits.
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).unsqueeze(1) / 16
        images = ResidentImages.from_unit_range(pixels, torch.from_numpy(digits.target))
        return images, images

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Returns the first and the last part of the permutation; the pool is between them."""
        permutation = fixed_permutation(_NUM_IMAGES)
        # From the end, so that the measured images do not depend on the number of training images.
        first_test = _NUM_IMAGES - self.sizes.num_test - self.sizes.num_val
        return permutation[: self.num_train], permutation[first_test:]

    def split_indices(self) -> dict[str, list[int]]:
        """Returns the positions of each split's images and of the pool, in scikit-learn's order."""
        return {**super().split_indices(), "pool": self.pool_indices}

    def unlabeled_source(self) -> LabeledImages:
        """Returns the pool with pseudo-labels, or the images of `unlabeled`.

        Raises:
            ValueError: If the pool is empty, or as in the base class.
        """
        if self.unlabeled not in (None, "unused"):
            return super().unlabeled_source()
        if not self.num_pool:
            raise ValueError(
                "Expected `num_pool` to be >= 1 or `unlabeled` to be a path if `unlabeled_share` is"
                f" above 0 but got 0 and {self.unlabeled}."
            )
        pool = self._pool()
        if self.unlabeled == "unused":
            return pool
        return ResidentImages(pool.images, self._pseudo_labels(pool.images))

    def _pool(self) -> ResidentImages:
        return cast(ResidentImages, self.sources()[0].subset(self.pool_indices))

    def _pseudo_labels(self, images: Tensor) -> Tensor:
        from sklearn.svm import SVC

        if not self._images:
            self.setup()
        training = cast(ResidentImages, self._images["training"])
        known, unknown = (
            to_unit_range(pixels.cpu()).flatten(1).numpy() for pixels in (training.images, images)
        )
        teacher = SVC().fit(known, training.labels.cpu().numpy())
        return torch.from_numpy(teacher.predict(unknown))
