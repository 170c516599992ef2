"""Files that a reader finds old or new, never half-written, whatever is killed or switched off."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, beside the file that it replaces when all is written.

    After an exception the file is the old one, and nothing is left beside it.

    Args:
        path: The file. Its folder is created where it does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "new" / "a.txt"
        ...     with whole_file(file) as beside:
        ...         _ = beside.write_text("all of it")
        ...     file.read_text()
        'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            # Else a power cut may leave the new name with nothing behind it.
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as a compressed `.npz`.

    Args:
        path: The file. Its folder is created where it does not exist.
        arrays: By name.
    """
    with whole_file(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)
