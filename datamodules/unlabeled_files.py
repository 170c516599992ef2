"""Pseudo-labelled images in the files that others publish them in."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from robust_flatness.datamodules.class_folders import (
    class_folders,
    files_by_class,
    labels_by_name,
)
from robust_flatness.datamodules.image_files import ImageFiles
from robust_flatness.datamodules.labelled_images import LabelledImages
from robust_flatness.datamodules.resident import ResidentImages

_KINDS = (
    "the pickle `ti_500K_pseudo_labeled.pickle` of Carmon et al., an .npz with `image` and `label`,"
    " or a folder with one folder a class"
)


def read_unlabeled(
    path: str | Path | None, *, num_classes: int, class_names: Sequence[str] | None = None
) -> LabelledImages:
    """Read pseudo-labelled images, of which no label is trusted to be right.

    Args:
        path: one of three; `~` is your home.
            A pickle of a dict with `data` `(N, H, W, C)`, uint8, and `extrapolated_targets`
            `(N,)`, as Carmon et al., *Unlabeled Data Improves Adversarial Robustness* (2019), have
            published 500,000 of the 80 Million Tiny Images; nothing but arrays is unpickled.
            An `.npz` with `image` `(N, H, W, C)`, uint8, and `label` `(N,)`.
            A folder with one folder a class, whose images are read as RGB when they are needed.
        num_classes: number of classes, which a folder must have as many folders as.
        class_names: names of the classes in their order, if they are known: then a folder may lack
            some of them, but have no others. If not, folders are numbered in order of their names.

    Returns:
        The images with their pseudo-labels, on the CPU.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if path is None:
        raise ValueError(
            f"Expected `unlabeled` to be {_KINDS} where `unlabeled_share` is above 0 but got None."
        )
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path, num_classes, class_names)
    if not path.is_file():
        raise ValueError(f"Expected `unlabeled` to be {_KINDS} but there is no {path}.")
    keys = ("image", "label") if path.suffix == ".npz" else ("data", "extrapolated_targets")
    return _from_arrays(path, _load(path), *keys)


def _read_folder(path: Path, num_classes: int, class_names: Sequence[str] | None) -> ImageFiles:
    found = class_folders(path)
    if class_names is None:
        if len(found) != num_classes:
            raise ValueError(
                f"Expected {num_classes} folders, one a class, in {path} but got {len(found)}."
            )
        return files_by_class(path, labels_by_name(found))
    labels = labels_by_name(class_names)
    if unknown := sorted(set(found) - set(class_names)):
        raise ValueError(
            f"Expected folders in {path} that are named as the {len(labels)} classes of the"
            f" labelled images but got {unknown[0]!r}."
        )
    return files_by_class(path, {name: labels[name] for name in found})


def _from_arrays(
    path: Path, arrays: Mapping[str, Any], images_key: str, labels_key: str
) -> ResidentImages:
    """Check what a file holds, and bring channels to the front."""
    if missing := [key for key in (images_key, labels_key) if key not in arrays]:
        raise ValueError(
            f"Expected `{images_key}` and `{labels_key}` in {path} but it has no `{missing[0]}`."
        )
    images, labels = np.asarray(arrays[images_key]), np.asarray(arrays[labels_key])
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"Expected `{images_key}` in {path} of shape (N, H, W, C) and type uint8"
            f" but got {images.shape} and {images.dtype}."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Expected `{labels_key}` in {path} to be {len(images)} integers"
            f" but got shape {labels.shape} and {labels.dtype}."
        )
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return ResidentImages(pixels, torch.from_numpy(labels.astype(np.int64)))


def _load(path: Path) -> Mapping[str, Any]:
    """Read the arrays of a file without running any code that it may hold."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        with path.open("rb") as file:
            return dict(_ArrayUnpickler(file).load())
    # Damaged files raise almost anything: this is one file, which a user named.
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be {_KINDS} but it cannot be read: {error}."
        ) from error


def _reconstructors() -> dict[tuple[str, str], Any]:
    """Return the functions that arrays are pickled with, wherever NumPy keeps them today."""
    array = np.zeros(1, np.uint8)
    functions = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        functions |= {
            (f"{core}.multiarray", "_reconstruct"): array.__reduce__()[0],
            (f"{core}.multiarray", "scalar"): array[0].__reduce__()[0],
            (f"{core}.numeric", "_frombuffer"): array.__reduce_ex__(5)[0],
        }
    return functions


def _latin1(text: str, encoding: str) -> bytes:
    """Give back the bytes that old pickle protocols write as text; `encoding` is never another."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers, and calls nothing else that a file names."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._allowed = _reconstructors()

    def find_class(self, module: str, name: str) -> Any:
        """Return what `module.name` stands for, if arrays need it."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and of pickles, which can run any code, only NumPy"
                " arrays and plain containers are read"
            )
        return self._allowed[module, name]
