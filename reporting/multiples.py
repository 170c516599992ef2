"""Small multiples: a panel a model, all on the same axes, so that models compare."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from robust_flatness.plotting.canvas import FONT, make_canvas

COLUMNS = 5
SMALL = FONT - 2  # points, of labels in panels a fifth of the page wide
Panels = list[list[Axes]]


def small_multiples(
    titles: Sequence[str], *, heights: Sequence[float] = (1.3,), width: float = 6.8
) -> tuple[Figure, Panels]:
    """Lays out a column of panels for each model, several models a row.

    Args:
        titles: A model each, above its panels.
        heights: Of the panels that a model has below each other, in inches.
        width: Of the figure, in inches.

    Returns:
        The figure, and the panels of each model from top to bottom.

    Example:
        >>> figure, panels = small_multiples(["AT", "TRADES", "MART"], heights=(1.2, 0.8))
        >>> len(panels), len(panels[0])
        (3, 2)
    """
    columns = min(COLUMNS, len(titles))
    rows, deep = -(-len(titles) // columns), len(heights)
    height = rows * sum(heights) + 0.8
    total = rows * deep * columns
    figure, grid = make_canvas(width, height, total, rows=rows * deep)
    cast(GridSpec, grid[0].get_gridspec()).set_height_ratios(
        [h for _ in range(rows) for h in heights]
    )
    panels: Panels = [
        [grid[(i // columns * deep + level) * columns + i % columns] for level in range(deep)]
        for i in range(len(titles))
    ]
    used = {id(axes) for own in panels for axes in own}
    for axes in grid:
        axes.tick_params(labelsize=SMALL, length=2)
        if id(axes) not in used:
            axes.remove()
    for title, own in zip(titles, panels):
        lines = textwrap.wrap(title, 22, max_lines=2, placeholder=" …")
        own[0].set_title("\n".join(lines), fontsize=SMALL + 0.5, pad=3)
    return figure, panels


class Ruler(NamedTuple):
    """An axis that panels share.

    Attributes:
        label: At the outer panels.
        set_ticks: Sets locator and formatter.
    """

    label: str
    set_ticks: Callable[[Axis], None]


def share_axes(panels: Panels, x: Ruler, *levels: Ruler) -> None:
    """Gives all panels of a level the same limits, which hold those that each had.

    Args:
        panels: Of `small_multiples`, with all that they show.
        x: Below the lowest panels.
        levels: Left of the first panels, one for each level.
    """
    columns = min(COLUMNS, len(panels))
    for level, y in enumerate(levels):
        same = [own[level] for own in panels]
        x_limits = _hull([axes.get_xlim() for axes in same])
        y_limits = _hull([axes.get_ylim() for axes in same])
        for i, axes in enumerate(same):
            axes.set(xlim=x_limits, ylim=y_limits)
            x.set_ticks(axes.xaxis)
            y.set_ticks(axes.yaxis)
            # Ticks below the last panel of each column, labels in the last row alone: rows that
            # stand further apart than others would look like groups.
            lowest = level == len(levels) - 1 and i + columns >= len(panels)
            last = lowest and i >= (len(panels) - 1) // columns * columns
            first = i % columns == 0
            axes.tick_params(labelbottom=lowest, labelleft=first)
            axes.set_xlabel(x.label if last else "", fontsize=SMALL)
            axes.set_ylabel(y.label if first else "", fontsize=SMALL)


def _hull(limits: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in limits), max(high for _, high in limits)
