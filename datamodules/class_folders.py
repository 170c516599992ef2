"""Images that are sorted into folders, one a class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets.folder import is_image_file

from robust_flatness.datamodules.image_files import ImageFiles


def class_folders(parent: Path) -> list[str]:
    """Return the names of the folders in `parent`, sorted, hidden ones aside.

    Raises:
        ValueError: if there is no such folder, or none in it.
    """
    if not parent.is_dir():
        raise ValueError(f"Expected a folder {parent} with one folder a class but got none.")
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"Expected one folder a class in {parent} but got none.")
    return names


def files_by_class(
    parent: Path, labels: dict[str, int], size: tuple[int, int] | None = None
) -> ImageFiles:
    """Return the image files of each class, sorted by class and name.

    Args:
        parent: folder that has a folder for each class.
        labels: label of each folder, by its name.
        size: width and height in pixels; `None` for those of the first file.

    Raises:
        ValueError: if a folder has no images, or the first file is damaged.
    """
    paths: list[Path] = []
    targets: list[int] = []
    for name, label in labels.items():
        files = _images_in(parent / name)
        paths += files
        targets += [label] * len(files)
    return ImageFiles(paths, torch.tensor(targets), size)


def labels_by_name(names: Sequence[str]) -> dict[str, int]:
    """Number classes in the order given.

    Example:
        >>> labels_by_name(["cat", "dog"])
        {'cat': 0, 'dog': 1}
    """
    return {name: label for label, name in enumerate(names)}


def _images_in(folder: Path) -> list[Path]:
    # Hidden ones are what file managers leave beside images, under the images' names.
    visible = (path for path in folder.rglob("*") if not path.name.startswith("."))
    files = [path for path in visible if is_image_file(path.name)]
    if not files:
        raise ValueError(f"Expected images in {folder} but got none.")
    return sorted(files, key=str)
