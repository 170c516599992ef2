"""From all images of a data set to those of each split, read once and checked."""

from robust_flatness.datamodules.images import LabelledImages
from robust_flatness.datamodules.resident import ResidentImages
from robust_flatness.datamodules.splits import Splits, ValFrom


def read_splits(
    train: LabelledImages,
    test: LabelledImages,
    splits: Splits,
    *,
    val_from: ValFrom,
    in_memory: bool,
) -> dict[str, LabelledImages]:
    """Take the images of each split, and read no others.

    Args:
        train: all training images.
        test: all test images.
        splits: positions of the images of each split.
        val_from: the set that `splits.val` counts in, `"train"` or `"test"`.
        in_memory: whether to read them now, instead of whenever they are asked for.

    Returns:
        The images of `"training"`, `"train"`, `"test"` and, unless it is empty, `"val"`, on the
        CPU.

    Raises:
        ValueError: if an image that is held in memory or measured on is damaged, or has another
            size than the others.
    """
    take = ResidentImages.load if in_memory else lambda images: images
    training = take(train.subset(splits.training))
    measured = {
        "train": training.subset(range(len(splits.train))),
        "test": take(test.subset(splits.test)),
    }
    if splits.val:
        measured["val"] = take((test if val_from == "test" else train).subset(splits.val))
    if not in_memory:
        for images in measured.values():
            _read_once(images)
    return {"training": training, **measured}


def check_images(
    images: LabelledImages,
    *,
    name: str,
    num_classes: int,
    in_channels: int,
    like: LabelledImages | None = None,
) -> None:
    """Make sure that there are images, with the classes and channels that the network will have.

    Args:
        images: images to check, of which the first is read.
        name: what the error calls them, such as `"training"`.
        num_classes: number K of classes; labels must lie in 0 to K - 1.
        in_channels: number of channels.
        like: images that these must have the size of; `None` for any size.

    Raises:
        ValueError: if one of them does not fit.

    Example:
        >>> import torch
        >>> images = ResidentImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([7]))
        >>> check_images(images, name="test", num_classes=5, in_channels=1)
        Traceback (most recent call last):
        ValueError: Expected labels of test images in 0 to 4 but got labels in 7 to 7.
    """
    if not len(images):
        raise ValueError(f"Expected at least 1 {name} image but got none.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Expected labels of {name} images in 0 to {num_classes - 1}"
            f" but got labels in {low} to {high}."
        )
    channels, *size = _shape(images)
    if channels != in_channels:
        raise ValueError(
            f"Expected {name} images of {in_channels} channels but got {channels} channels."
        )
    if like is not None and size != _shape(like)[1:]:
        _, height, width = _shape(like)
        raise ValueError(
            f"Expected {name} images of {width}x{height} pixels, as the labelled ones have,"
            f" but got {size[1]}x{size[0]}."
        )


def _read_once(images: LabelledImages, chunk: int = 100) -> None:
    """Find damaged images before training, and not when they are first measured on."""
    for start in range(0, len(images), chunk):
        images.__getitems__(range(start, min(start + chunk, len(images))))


def _shape(images: LabelledImages) -> list[int]:
    """Return channels, height and width of the first image."""
    return list(images.__getitems__([0])[0].shape[1:])
