"""Handwritten digits that come with scikit-learn: the data set that needs no download."""

from typing import Any, cast

import torch
from torch import Tensor

from robust_flatness.datamodules.augmentation import Augment
from robust_flatness.datamodules.computed_statistics import ComputedStatistics
from robust_flatness.datamodules.labelled_images import LabelledImages, to_unit_range
from robust_flatness.datamodules.resident import ResidentImages
from robust_flatness.datamodules.splits import fixed_permutation
from robust_flatness.functional.checks import Eps

_NUM_IMAGES = 1797


class Digits(ComputedStatistics):
    """1797 grey digits of 8x8 pixels in 10 classes, small enough to overfit within a minute.

    They have no test set of their own, so a permutation that never changes is cut in four: 300
    training images, a pool of 397 for methods that use unlabelled images, 600 images of `test`
    and 500 of `val`. All of `split_indices` count in scikit-learn's order.

    With `unlabeled_share` above 0 and no `unlabeled`, the pool is what batches mix in, labelled by
    a teacher that has seen the training images alone.

    Args:
        eps: radius of the L-infinity ball that measures use on these images, in pixels of [0, 1].
        batch_size: images in a global batch.
        augment: as in the base class, but nothing is done by default.
        flip: whether augmentation flips images; mirrored digits are no digits.
        num_train: number of training images, the first ones of the permutation.
        num_pool: number of images in the pool, those after the training images.
        num_test: number of images of `test`, those before `val`.
        num_val: number of images of `val`, the last ones.
        **kwargs: the other arguments of `~robust_flatness.datamodules.RobustDataModule`.

    Raises:
        ValueError: if the splits need more images than there are, or as in the base class.

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
        for name, value, least in (("num_train", num_train, 1), ("num_pool", num_pool, 0)):
            if value < least:
                raise ValueError(f"Expected `{name}` to be >= {least} but got {value}.")
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
        """Positions of the images that belong to no split, for use without their labels."""
        return fixed_permutation(_NUM_IMAGES)[self.num_train : self.num_train + self.num_pool]

    def sources(self) -> tuple[LabelledImages, LabelledImages]:
        """Return all digits, once for the training and once for the test images."""
        # Imported here: scikit-learn takes longer to import than the digits to read.
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).unsqueeze(1) / 16
        images = ResidentImages.from_unit_range(pixels, torch.from_numpy(digits.target))
        return images, images

    def orders(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Return the first and the last part of the permutation; the pool lies between them."""
        permutation = fixed_permutation(_NUM_IMAGES)
        # Counted from the end: the measured images stay where fewer or more are trained on.
        first_test = _NUM_IMAGES - self.sizes.num_test - self.sizes.num_val
        return permutation[: self.num_train], permutation[first_test:]

    def unlabeled_source(self) -> LabelledImages:
        """Return the pool with the teacher's labels, or the images that `unlabeled` names.

        Raises:
            ValueError: if the pool is empty, or as in the base class.
        """
        if self.unlabeled is not None:
            return super().unlabeled_source()
        if not self.num_pool:
            raise ValueError(
                "Expected `num_pool` to be >= 1 or `unlabeled` to be given where `unlabeled_share`"
                " is above 0 but got 0 and None."
            )
        pool = self._pool()
        return ResidentImages(pool.images, self._pseudo_labels(pool.images))

    @property
    def teacher_accuracy(self) -> float:
        """Share of the pool that the teacher labels rightly; for reports, not for training."""
        pool = self._pool()
        return (self._pseudo_labels(pool.images) == pool.labels).double().mean().item()

    def _pool(self) -> ResidentImages:
        return cast(ResidentImages, self.sources()[0].subset(self.pool_indices))

    def _pseudo_labels(self, images: Tensor) -> Tensor:
        """Label images by a support vector machine that is trained on the training images."""
        from sklearn.svm import SVC

        if not self._images:
            self.setup()
        training = cast(ResidentImages, self._images["training"])
        known, unknown = (
            to_unit_range(pixels.cpu()).flatten(1).numpy() for pixels in (training.images, images)
        )
        teacher = SVC().fit(known, training.labels.cpu().numpy())
        return torch.from_numpy(teacher.predict(unknown))

    def split_indices(self) -> dict[str, list[int]]:
        """Return the positions of each split's images and of the pool, in scikit-learn's order."""
        return {**super().split_indices(), "pool": self.pool_indices}
