"""Names of logged metrics, and their values in the rows of a run."""

import math
from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, float]]
# The robust loss of each split.
LOSSES = {
    "test": "test/robust_loss",
    "val": "val/robust_loss",
    "train": "train_eval/robust_loss",
}


def series(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Epochs and values of a metric, without those that are absent or not finite.

    Args:
        rows: Rows of a run, with `epoch`.
        name: The metric.

    Example:
        >>> series([{"epoch": 1, "val/error": 0.5}, {"epoch": 0}], "val/error")
        [(1, 0.5)]
    """
    pairs = ((row["epoch"], row.get(name)) for row in rows)
    return sorted((e, value) for e, value in pairs if value is not None and math.isfinite(value))


def logged_split(rows: Rows) -> str | None:
    """The first of `test`, `val` and `train` of which an epoch has flatness and robust loss.

    Args:
        rows: Rows of a run.

    Example:
        >>> logged_split([{"epoch": 0, "flatness/average/val": 0.1, "val/robust_loss": 2.0}])
        'val'
    """
    for split, loss in LOSSES.items():
        losses = dict(series(rows, loss))
        if any(epoch in losses for epoch, _ in series(rows, f"flatness/average/{split}")):
            return split
    return None
