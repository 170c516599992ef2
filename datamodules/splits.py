"""Which images are trained on and which are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

ValFrom: TypeAlias = Literal["test", "train"]
"""Where the images for early stopping come from."""

_ORDER_SEED = 0  # changing it changes what every earlier result was measured on


@dataclass(frozen=True)
class SplitSizes:
    """How many images each split has.

    Args:
        num_train: number of images to train on, the first ones; `None` for all there are.
        num_train_eval: number of training images to measure on, fewer where there are fewer.
        num_val: number of images for early stopping, the last ones of the set they come from.
        num_test: number of test images to measure on, the first ones.
        val_from: `"test"` as in the paper, whose early stopping selects on test images, or
            `"train"` to take `val` out of the training set.

    Raises:
        ValueError: if a number is below 1 or `val_from` is neither of the two.
    """

    num_train: int | None
    num_train_eval: int
    num_val: int
    num_test: int
    val_from: ValFrom

    def __post_init__(self) -> None:
        for name in ("num_train", "num_train_eval", "num_val", "num_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be >= 1 but got {value}.")
        if self.val_from not in ("test", "train"):
            raise ValueError(
                f"Expected `val_from` to be 'test' or 'train' but got {self.val_from!r}."
            )


@dataclass(frozen=True)
class Splits:
    """Positions of the images of each split in the set that they come from.

    Attributes:
        training: what the weights are trained on.
        train: the first images of `training`, measured without augmentation.
        val: what early stopping selects on, in the test set unless `val_from="train"`.
        test: what is reported, in the test set.
    """

    training: list[int]
    train: list[int]
    val: list[int]
    test: list[int]


def make_splits(
    train_order: Sequence[int],
    test_order: Sequence[int],
    sizes: SplitSizes,
    *,
    with_val: bool = True,
) -> Splits:
    """Cut the ordered training and test images into splits, of which `val` overlaps none.

    Args:
        train_order: positions of the training images, in the order that counts.
        test_order: positions of the test images, in the order that counts.
        sizes: how many images each split has.
        with_val: whether `val` is needed; if not, and if there are too few test images for it, it
            is empty.

    Returns:
        The positions of each split.

    Raises:
        ValueError: if there are fewer images than `sizes` asks for.

    Example:
        >>> sizes = SplitSizes(None, num_train_eval=2, num_val=2, num_test=3, val_from="test")
        >>> make_splits(range(4), range(6), sizes)
        Splits(training=[0, 1, 2, 3], train=[0, 1], val=[4, 5], test=[0, 1, 2])
    """
    training, test = list(train_order), list(test_order)
    if sizes.val_from == "train":
        if sizes.num_val >= len(training):
            raise ValueError(
                f"Expected `num_val` to be below the number of training images {len(training)}"
                f" where `val_from` is 'train' but got {sizes.num_val}."
            )
        training, val = training[: -sizes.num_val], training[-sizes.num_val :]
    elif with_val or len(test) >= sizes.num_test + sizes.num_val:
        val = test[-sizes.num_val :]
    else:
        val = []
    _check_test_images(len(test), sizes, with_val=bool(val))
    if sizes.num_train is not None and sizes.num_train > len(training):
        raise ValueError(
            f"Expected `num_train` to be at most {len(training)}, the number of training images,"
            f" but got {sizes.num_train}."
        )
    if not training:
        raise ValueError("Expected at least 1 training image but got none.")
    training = training[: sizes.num_train]
    return Splits(training, training[: sizes.num_train_eval], val, test[: sizes.num_test])


def fixed_permutation(length: int) -> list[int]:
    """Shuffle the positions 0 to `length - 1` in a way that no run or seed changes.

    For images that come sorted by class, or without a test set of their own.

    Example:
        >>> fixed_permutation(5) == fixed_permutation(5)
        True
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    return torch.randperm(length, generator=generator).tolist()


def _check_test_images(available: int, sizes: SplitSizes, *, with_val: bool) -> None:
    """Make sure that `test` and `val` do not overlap."""
    num_val = sizes.num_val if sizes.val_from == "test" and with_val else 0
    if available < sizes.num_test + num_val:
        raise ValueError(
            f"Expected at least {sizes.num_test + num_val} test images for `num_test`"
            f" {sizes.num_test} and `num_val` {num_val} but got {available}."
        )
