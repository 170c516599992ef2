"""Landscapes of a run as one file that NumPy reads without pickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robust_flatness.run_folder.atomic_write import write_arrays
from robust_flatness.run_folder.json_file import jsonable

Array = NDArray[np.float64]


class Landscape(NamedTuple):
    """The loss around the weights.

    Attributes:
        coordinates: Steps s along the directions, `(S,)`.
        losses: Loss of each example, in nats: `(D, S, N)` along D directions, or `(S, S, N)` on a
            surface.
    """

    coordinates: Array
    losses: Array


def write_landscapes(
    path: Path, landscapes: Mapping[str, Landscape], settings: Mapping[str, Any]
) -> None:
    """Writes landscapes; a reader finds the old or the new file, never half of one.

    The file has `names`, the names of the landscapes; for each of them `<name>/coordinates` and
    `<name>/losses`; and `settings` as JSON.

    Args:
        path: The `.npz` file. Its folder is created where it does not exist.
        landscapes: By name, such as `final/random` or `early_stopped/surface`.
        settings: How they were measured.
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
    """Reads what `write_landscapes` wrote.

    Args:
        path: The `.npz` file.

    Returns:
        Landscapes by name, and how they were measured.

    Raises:
        ValueError: If the file is not one of landscapes.
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
        numbers = all(part.dtype.kind in "iuf" for part in (coordinates, losses))
        if not (numbers and losses.ndim == 3 and losses.size and np.isfinite(coordinates).all()):
            raise ValueError(f"Expected {name} to be losses (D, S, N) but got {losses.shape}.")
        if coordinates.shape != losses.shape[1:2]:
            raise ValueError(
                f"Expected {name} to have {losses.shape[1]} steps but got {coordinates.shape}."
            )
    return landscapes, settings
