"""The images to train on and the images to measure on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from robust_flatness.functional.checks import check_choice, check_count

ValFrom: TypeAlias = Literal["test", "train"]
"""The set that the images for early stopping are taken from."""

_ORDER_SEED = 0  # another seed would change the images of all earlier results


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of images of the splits, see `RobustDataModule`."""

    num_train: int | None
    num_train_eval: int
    num_val: int
    num_test: int
    val_from: ValFrom

    def __post_init__(self) -> None:
        for name in ("num_train", "num_train_eval", "num_val", "num_test"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low=1)
        check_choice("val_from", self.val_from, get_args(ValFrom))


def make_splits(
    train_order: Sequence[int],
    test_order: Sequence[int],
    sizes: SplitSizes,
    *,
    with_val: bool = True,
) -> dict[str, list[int]]:
    """Divides the ordered training and test images into splits; `val` overlaps no other split.

    Args:
        train_order: Positions of the training images, see `RobustDataModule.orders`.
        test_order: Positions of the test images.
        sizes: Numbers of images.
        with_val: Whether `val` is needed; if not, it is empty if there are too few test images.

    Returns:
        The positions of `"training"`, the images to train on, `"train"`, the first of them, which
        are measured without augmentation, `"val"` and `"test"`.

    Example:
        >>> sizes = SplitSizes(None, num_train_eval=2, num_val=2, num_test=3, val_from="test")
        >>> make_splits(range(4), range(6), sizes)
        {'training': [0, 1, 2, 3], 'train': [0, 1], 'val': [4, 5], 'test': [0, 1, 2]}
    """
    training, test = list(train_order), list(test_order)
    num_val = sizes.num_val
    if sizes.val_from == "train":
        if num_val >= len(training):
            raise ValueError(
                f"Expected `num_val` to be below the number of training images {len(training)}"
                f" if `val_from` is 'train' but got {num_val}."
            )
        training, val = training[:-num_val], training[-num_val:]
        num_val = 0
    elif with_val or len(test) >= sizes.num_test + num_val:
        val = test[-num_val:]
    else:
        val, num_val = [], 0
    if len(test) < sizes.num_test + num_val:
        raise ValueError(
            f"Expected at least {sizes.num_test + num_val} test images for `num_test`"
            f" {sizes.num_test} and `num_val` {num_val} but got {len(test)}."
        )
    if sizes.num_train is not None and sizes.num_train > len(training):
        raise ValueError(
            f"Expected `num_train` to be at most {len(training)}, the number of training images,"
            f" but got {sizes.num_train}."
        )
    if not training:
        raise ValueError("Expected at least 1 training image but got none.")
    training = training[: sizes.num_train]
    train, test = training[: sizes.num_train_eval], test[: sizes.num_test]
    return {"training": training, "train": train, "val": val, "test": test}


def fixed_permutation(length: int) -> list[int]:
    """Returns a permutation of 0 to `length - 1` that depends neither on the run nor on its seed.

    It orders images that are sorted by class, or that have no test set of their own.

    Example:
        >>> fixed_permutation(5) == fixed_permutation(5)
        True
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    return torch.randperm(length, generator=generator).tolist()
