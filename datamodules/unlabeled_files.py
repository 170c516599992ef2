"""Pseudo-labeled images in the files that they are published in."""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from robust_flatness.datamodules.image_files import (
    class_folders,
    read_class_folders,
    warn_left_out,
)
from robust_flatness.datamodules.images import LabeledImages, ResidentImages

_KINDS = (
    "the pickle `ti_500K_pseudo_labeled.pickle` of Carmon et al., an .npz with `image` and `label`,"
    " a folder with one folder per class, or 'unused'"
)


def read_unlabeled(
    path: str | Path | None, *, num_classes: int, class_names: Sequence[str] | None = None
) -> LabeledImages:
    """Reads pseudo-labeled images.

    Args:
        path: One of three; `~` is the home folder.
            A pickle of a dict with `data` `(N, H, W, C)`, uint8, and `extrapolated_targets`
            `(N,)`, as Carmon et al., *Unlabeled Data Improves Adversarial Robustness* (2019),
            published 500,000 of the 80 Million Tiny Images; nothing but arrays is unpickled.
            An `.npz` with `image` `(N, H, W, C)`, uint8, and `label` `(N,)`.
            A folder with one folder per class, whose images are read as RGB when needed.
        num_classes: Number of classes, and of folders if `class_names` is `None`.
        class_names: Names of the classes in the order of their labels: the folders must have some
            of these names. `None` numbers the folders in the order of their names.

    Returns:
        The images with their pseudo-labels, on the CPU.

    Raises:
        ValueError: If there is no such file, or it contains something else.
    """
    if path is None:
        raise ValueError(
            f"Expected `unlabeled` to be {_KINDS} if `unlabeled_share` is above 0 but got None."
        )
    path = Path(path).expanduser()
    if path.is_file():
        keys = ("image", "label") if path.suffix == ".npz" else ("data", "extrapolated_targets")
        return _from_arrays(path, _load(path), *keys)
    if not path.is_dir():
        raise ValueError(f"Expected `unlabeled` to be {_KINDS} but there is no {path}.")
    names = class_folders(path)
    if class_names is None and len(names) != num_classes:
        raise ValueError(
            f"Expected {num_classes} folders, one per class, in {path} but got {len(names)}."
        )
    class_names = names if class_names is None else class_names
    if unknown := sorted(set(names) - set(class_names)):
        raise ValueError(
            f"Expected folders in {path} that are named as the {len(class_names)} classes of the"
            f" labeled images but got {unknown[0]!r}."
        )
    images, left_out = read_class_folders(path, class_names)
    warn_left_out(left_out)
    return images


def _from_arrays(
    path: Path, arrays: Mapping[str, Any], images_key: str, labels_key: str
) -> ResidentImages:
    if missing := [key for key in (images_key, labels_key) if key not in arrays]:
        raise ValueError(
            f"Expected `{images_key}` and `{labels_key}` in {path} but it has no `{missing[0]}`."
        )
    values = [arrays[key] for key in (images_key, labels_key)]
    for index, key in enumerate((images_key, labels_key)):
        if isinstance(values[index], list) and set(map(type, values[index])) == {int}:
            values[index] = np.asarray(values[index])
        if not isinstance(values[index], np.ndarray):
            kind = type(values[index]).__name__
            raise ValueError(f"Expected `{key}` in {path} to be an array but got {kind}.")
    images, labels = values
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
    """Reads the arrays of a file without running code that it may contain."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        # A memory map never returns more bytes than the file has, whatever length is read.
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
            content = _ArrayUnpickler(mapped).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} and no dictionary")
        return {k: v.array if isinstance(v, _Replacement) else v for k, v in content.items()}
    # Damaged files raise errors of almost any type.
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be {_KINDS} but it cannot be read: {error}."
        ) from error


class _Replacement:
    """Replaces a class or function of NumPy that a pickle calls.

    NumPy's own trust their arguments: the bytes of an array of objects become pointers.
    """

    array: np.ndarray[Any, Any] | None = None

    def __init__(self, *args: Any) -> None:
        pass

    # Pickles set the state of objects by this method, or else their attributes.
    def __setstate__(self, state: Any) -> None:
        _require(False)


class _DType(_Replacement):
    def __init__(self, name: Any, *_: Any) -> None:
        _require(isinstance(name, str) and name in _TYPES)
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _require(isinstance(state, tuple) and len(state) == 8)
        # The rest is the state of a type without fields.
        _require(state[1] in ("<", ">", "|", "=") and state[2:] == (None, None, None, -1, -1, 0))
        self.dtype = self.dtype.newbyteorder(state[1])


class _FromBuffer(_Replacement):
    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> None:
        _require(isinstance(data, bytes) and isinstance(dtype, _DType))
        _require(isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape))
        _require(math.prod(shape) * dtype.dtype.itemsize == len(data))
        array = np.frombuffer(data, dtype.dtype)
        if order == "K":  # a transposed array, of newer versions of NumPy
            _require(isinstance(axes, tuple))
            self.array = array.reshape(shape).transpose(axes)
        else:
            _require(order in ("C", "F") and axes is None)
            self.array = array.reshape(shape, order=order)


class _Array(_Replacement):
    def __setstate__(self, state: Any) -> None:
        _require(isinstance(state, tuple) and len(state) == 5)
        _, shape, dtype, is_fortran, data = state
        self.array = _FromBuffer(data, dtype, shape, "F" if is_fortran else "C").array


class _Latin1(_Replacement):
    """Replaces `_codecs.encode`, by which old protocols write bytes."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        _require(isinstance(text, str) and encoding == "latin1")
        return text.encode("latin1")


# Numbers: no objects, no records, no text.
_TYPES = {"b1", "i1", "u1", *(f"{kind}{size}" for kind in "iuf" for size in (2, 4, 8))}
_REPLACEMENTS = {
    "numpy.ndarray": _Replacement,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _Replacement,
    "numpy.core.numeric._frombuffer": _FromBuffer,
    "_codecs.encode": _Latin1,
}


def _require(condition: bool) -> None:
    if not condition:
        raise pickle.UnpicklingError("of NumPy, only plain arrays of numbers are read")


class _ArrayUnpickler(pickle._Unpickler):
    """Unpickles arrays of numbers and plain containers, and calls nothing that a file names.

    The base class is Python's unpickler because C's allocates as much memory as a damaged length in
    the file says. Keys must be strings because hashing a deep tuple crashes the process.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in {*pickle.EMPTY_SET, *pickle.ADDITEMS, *pickle.FROZENSET}
        and code not in {*pickle.EXT1, *pickle.EXT2, *pickle.EXT4}
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns the replacement of `module.name` if arrays need it."""
        # NumPy 2 renamed `numpy.core`.
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if path not in _REPLACEMENTS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and of pickles, which can run any code, only NumPy"
                " arrays and plain containers are read"
            )
        return _REPLACEMENTS[path]

    def load_bytearray8(self) -> None:
        """Reads bytes, without allocating their length before."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_dict(self) -> None:
        """Makes a dictionary of the items since the mark."""
        items = self.pop_mark()  # which replaces `self.append`
        self.append(_dictionary(items))

    def load_setitem(self) -> None:
        """Sets one item of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_dictionary([key, value]))

    def load_setitems(self) -> None:
        """Sets the items since the mark."""
        items = self.pop_mark()
        self.stack[-1].update(_dictionary(items))

    dispatch |= {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _dictionary(items: list[Any]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in items[::2]):
        raise pickle.UnpicklingError("of dictionaries, only those with names as keys are read")
    return dict(zip(items[::2], items[1::2]))
