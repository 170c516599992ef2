"""Images that are sorted into folders, one a class."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from robust_flatness.datamodules.image_files import ImageFiles

_ENDINGS = ", ".join(IMG_EXTENSIONS)


def class_folders(parent: Path) -> list[str]:
    """Return the names of the folders in `parent`, sorted, hidden ones aside.

    Raises:
        ValueError: if there is no such folder, or none in it.
    """
    if not parent.is_dir():
        raise ValueError(f"Expected a folder {parent} with one folder a class but got none.")
    names = [entry.name for entry in _visible(parent) if _holds(entry.is_dir)]
    if not names:
        raise ValueError(f"Expected one folder a class in {parent} but got none.")
    return names


@dataclass
class ClassFolders:
    """Reads folders of images, one a class, and counts the other files in them.

    Hidden files and folders are skipped at any depth: file managers and notebooks leave copies
    there under the images' names. Links are followed; a folder that links make appear twice in a
    class is read once, and a link to a folder above it is a loop, which ends there.

    Attributes:
        others: visible files whose names are no images'.
    """

    others: list[Path] = field(default_factory=list)

    def read(
        self, parent: Path, labels: Mapping[str, int], size: tuple[int, int] | None = None
    ) -> ImageFiles:
        """Return the image files of each class, sorted by class and name.

        Args:
            parent: folder that has a folder for each class.
            labels: label of each folder, by its name.
            size: width and height in pixels; `None` for those of the first file.

        Raises:
            ValueError: if a folder has no images or cannot be read, if something with an image's
                name is no regular file, or if the first file is damaged.
        """
        self.others += [Path(e) for e in _visible(parent) if not _holds(e.is_dir)]
        paths: list[Path] = []
        targets: list[int] = []
        for name, label in labels.items():
            files = self._images_in(parent / name)
            paths += files
            targets += [label] * len(files)
        return ImageFiles(paths, torch.tensor(targets), size)

    def report(self) -> None:
        """Warn once about all files that are no images."""
        if self.others:
            rank_zero_warn(
                f"Files left out, as they are no images in a class folder: {len(self.others)}, "
                f"such as {self.others[0]}; names of images end in {_ENDINGS}."
            )

    def _images_in(self, folder: Path) -> list[Path]:
        files: list[Path] = []
        seen = {os.path.realpath(above) for above in folder.absolute().parents}
        waiting = [str(folder)]
        while waiting:
            real = os.path.realpath(here := waiting.pop())
            if real in seen:
                continue
            seen.add(real)
            for entry in _visible(here):
                if _holds(entry.is_dir):
                    # A link to a folder that holds this one would bring in all other classes.
                    if not Path(real).is_relative_to(os.path.realpath(entry)):
                        waiting.append(entry.path)
                elif not is_image_file(entry.name):
                    self.others.append(Path(entry))
                elif _holds(entry.is_file):
                    files.append(Path(entry))
                else:
                    # Opening a FIFO would wait for a writer for ever.
                    raise ValueError(
                        f"Expected {entry.path} to be a file but it is a FIFO, a device, a socket "
                        "or a broken link."
                    )
        if not files:
            raise ValueError(
                f"Expected images in {folder} but got none: names of images end in {_ENDINGS}."
            )
        return sorted(files, key=str)


def labels_by_name(names: Sequence[str]) -> dict[str, int]:
    """Number classes in the order given.

    Example:
        >>> labels_by_name(["cat", "dog"])
        {'cat': 0, 'dog': 1}
    """
    return {name: label for label, name in enumerate(names)}


def _visible(folder: Path | str) -> list["os.DirEntry[str]"]:
    """What a folder holds, sorted by name, hidden files and folders aside."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(
            f"Expected {folder} to be a folder that can be read but got {error.strerror}."
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _holds(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError:  # links that only lead to each other
        return False
