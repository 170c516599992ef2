"""Results as JSON that every reader accepts.

Example:
    >>> jsonable({"loss": float("nan"), "labels": torch.tensor([1, 2])})
    {'loss': None, 'labels': [1, 2]}
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robust_flatness.run_folder.atomic_write import whole_file

# The numbers of one list belong on one line: the indices of a split are thousands.
_LIST_OF_NUMBERS = re.compile(r"\[\n\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\n\s*\]")


def jsonable(value: Any) -> Any:
    """Turns settings and figures into what JSON knows.

    Args:
        value: Any nesting of mappings, sequences, tensors, arrays, numbers and other objects.

    Returns:
        Dictionaries with names as keys, lists, numbers, strings and None; numbers that are not
        finite become None, since `NaN` is no JSON, and objects of other kinds become strings.
    """
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return jsonable(value.tolist())
    return str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON; a reader finds the old or the new file, never half of one.

    Args:
        path: The file. Its folder is created where it does not exist.
        content: Anything that `jsonable` understands.
    """
    text = json.dumps(jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with whole_file(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
