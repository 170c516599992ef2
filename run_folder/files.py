"""Files of a run folder: atomic writes, strict JSON, and landscapes.

Example:
    >>> jsonable({"loss": float("nan"), "labels": np.arange(2)})
    {'loss': None, 'labels': [0, 1]}
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Lists of numbers are written on one line: the indices of a split are thousands.
_LIST_OF_NUMBERS = re.compile(r"\[\n\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\n\s*\]")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` once the block has finished.

    A reader sees the old or the new file, never a part of one. If the block raises, the old file
    stays and the temporary one is removed. The folder is created if it does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "new" / "a.txt"
        ...     with atomic_write(file) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     file.read_text()
        'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            # Without it, a power cut may leave the new name with no content.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name as a compressed `.npz`, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def jsonable(value: Any) -> Any:
    """Converts nested settings, metrics, tensors and arrays to JSON types.

    Numbers that are not finite become None, because `NaN` is not JSON; objects of other types
    become strings.
    """
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, and NumPy's arrays and scalars
        return jsonable(value.tolist())
    return str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes as JSON, atomically, a mapping of anything that `jsonable` converts."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)
    text = _LIST_OF_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    write_text(path, text + "\n")


class Landscape(NamedTuple):
    """The loss around the weights.

    Attributes:
        coordinates: Steps s along the directions, `(S,)`.
        losses: Loss of each example, in nats: `(D, S, N)` along D directions, or `(S, S, N)` on a
            surface.
    """

    coordinates: Array
    losses: Array

    @property
    def curves(self) -> Array:
        """The mean loss over examples, `(D, S)` or `(S, S)`."""
        return np.asarray(self.losses.mean(axis=2))


def write_landscapes(
    path: Path, landscapes: Mapping[str, Landscape], settings: Mapping[str, Any]
) -> None:
    """Writes landscapes atomically to an `.npz` file that NumPy reads without pickles.

    The file has `names`, such as `final/random` and `early_stopped/surface`; for each of them
    `<name>/coordinates` and `<name>/losses`; and `settings`, how they were measured, as JSON.
    """
    arrays: dict[str, Any] = {
        f"{name}/{part}": values
        for name, landscape in landscapes.items()
        for part, values in landscape._asdict().items()
    }
    text = json.dumps(jsonable(settings), allow_nan=False)
    arrays |= {"names": np.array(list(landscapes)), "settings": np.array(text)}
    write_arrays(path, arrays)


def read_landscapes(path: Path) -> tuple[dict[str, Landscape], dict[str, Any]]:
    """Reads the landscapes by name, and the settings, of a file of `write_landscapes`.

    Raises:
        ValueError: If the file does not hold landscapes.
    """
    with np.load(path, allow_pickle=False) as file:
        if "names" not in file or "settings" not in file:
            raise ValueError(f"Expected {path} to be a file of landscapes but got {file.files}.")
        landscapes = {
            str(name): Landscape(file[f"{name}/coordinates"], file[f"{name}/losses"])
            for name in file["names"]
        }
        settings = json.loads(str(file["settings"]))
    for name, (coordinates, losses) in landscapes.items():
        are_numbers = all(part.dtype.kind in "iuf" for part in (coordinates, losses))
        if not (
            are_numbers and losses.ndim == 3 and losses.size and np.isfinite(coordinates).all()
        ):
            raise ValueError(f"Expected {name} to be losses (D, S, N) but got {losses.shape}.")
        if coordinates.shape != losses.shape[1:2]:
            raise ValueError(
                f"Expected {name} to have {losses.shape[1]} steps but got {coordinates.shape}."
            )
    return landscapes, settings
