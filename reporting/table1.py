"""Table 1 of the paper with rows of one's own: robust error beside flatness, sorted and grouped.

Example:
    >>> runs, _ = read_runs("runs")  # doctest: +SKIP
    >>> table = table1(group_models(runs), published_models("table1"))  # doctest: +SKIP
    >>> write_table(table, Path("report"))  # doctest: +SKIP
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robust_flatness.reporting.models import Model, Point
from robust_flatness.reporting.table1_rows import COLUMNS, Cell, Column, Row, make_rows

_SORTED_BY = COLUMNS[0].key
# Below that many rows, 30 % of them are none.
_FEWEST_ROWS = 4


@dataclass(frozen=True)
class Group:
    """Rows of about the same robustness, the most robust first.

    Attributes:
        name: `good`, `average`, `poor`, `all` where rows are too few or too close to be grouped,
            or `without RErr`.
        rows: Sorted by test RErr.
        means: Of each column over those rows that have it, only where all are by one attack.
    """

    name: str
    rows: tuple[Row, ...]
    means: Mapping[str, float]


@dataclass(frozen=True)
class Table1:
    """The table.

    Attributes:
        data: Class of the data that all rows are of, such as `Digits`.
        groups: None of them empty.
        thresholds: Test RErr, as a share of 1, below which a row is good, and from which on poor;
            None where there are no groups.
    """

    data: str
    groups: tuple[Group, ...]
    thresholds: tuple[float, float] | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows as they stand."""
        return tuple(row for group in self.groups for row in group.rows)

    def cells(self, column: Column, *, published: bool = False) -> list[Cell]:
        """All cells of a column, of the rows that have it."""
        found = (row.published if published else row.cells for row in self.rows)
        return [cells[column.key] for cells in found if column.key in cells]

    def attacks(self, column: Column, *, published: bool = False) -> list[str]:
        """The attacks that a column holds figures of, AutoAttack first."""
        cells = self.cells(column, published=published)
        return sorted({cell.attack for cell in cells if cell.attack is not None})


def table1(models: Sequence[Model], published: Sequence[Point] = ()) -> Table1:
    """Puts models into the paper's Table 1, a row each.

    RErr on test images is by AutoAttack, or by PGD where that was not measured, and each cell knows
    by which; on training images by PGD, with the weights at rest. As in the paper, rows are good,
    average or poor by the 30 % and 70 % percentiles of test RErr, rounded to whole percents: the
    paper's own 19 rows give 57 % and 60 %.

    Args:
        models: Of one data set, as `group_models` returns them.
        published: Rows of a paper, such as `published_models("table1")`.

    Raises:
        ValueError: If there are no models, or they are of several data sets.
    """
    data = sorted({run.data for model in models for run in model.runs})
    if len(data) != 1:
        raise ValueError(f"Expected `models` to be of one data set but got {data or 'no model'}.")
    rows = make_rows(models, published)
    measured = sorted((row for row in rows if _SORTED_BY in row.cells), key=_by_error)
    rest = [row for row in rows if _SORTED_BY not in row.cells]
    thresholds = group_thresholds([_error(row) for row in measured])
    grouped = {name: _between(measured, *bounds) for name, bounds in _bounds(thresholds)}
    grouped["without RErr"] = rest
    groups = tuple(Group(name, tuple(of), _means(of)) for name, of in grouped.items() if of)
    return Table1(data[0], groups, thresholds)


def group_thresholds(errors: Sequence[float]) -> tuple[float, float] | None:
    """The test errors that part good from average and average from poor rows.

    Args:
        errors: As shares of 1, a row each.

    Returns:
        The 30 % and 70 % percentiles in whole percents; None where rows are too few or too close.

    Example:
        >>> group_thresholds([0.5, 0.54, 0.6, 0.7])
        (0.54, 0.61)
    """
    if len(errors) < _FEWEST_ROWS:
        return None
    low, high = (round(float(np.percentile(errors, share)), 2) for share in (30, 70))
    return (low, high) if low < high else None


def _bounds(thresholds: tuple[float, float] | None) -> list[tuple[str, tuple[float, float]]]:
    if thresholds is None:
        return [("all", (-math.inf, math.inf))]
    low, high = thresholds
    return [("good", (-math.inf, low)), ("average", (low, high)), ("poor", (high, math.inf))]


def _by_error(row: Row) -> tuple[float, str]:
    return _error(row), row.model.label


def _error(row: Row) -> float:
    # Shares of images, of which a sum over seeds may be off by the last digit.
    return round(row.cells[_SORTED_BY].mean, 9)


def _between(rows: Sequence[Row], low: float, high: float) -> list[Row]:
    return [row for row in rows if low <= _error(row) < high]


def _means(rows: Sequence[Row]) -> dict[str, float]:
    means: dict[str, float] = {}
    for column in COLUMNS:
        cells = [row.cells[column.key] for row in rows if column.key in row.cells]
        if len({cell.attack for cell in cells}) == 1:
            means[column.key] = statistics.fmean(cell.mean for cell in cells)
    return means
