"""Size, colors, legend and layout of all figures.

Example:
    >>> figure, all_axes = make_canvas(6.8, 3.3, panels=2)
    >>> len(all_axes)
    2
"""

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import METHOD_LABELS

# Okabe and Ito's colors, which color-blind readers and grey prints keep apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
FONT = 9  # points, at the printed width
SMALL = FONT - 2  # points, beside points and in panels a fifth of the page wide

# Colours of methods, readable on white and on dark pages.
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, "#7B61FF", "#A6761D")
_MARKERS = ("o", "s", "^", "D", "v")


class PlainFigure(Figure):
    """A figure that shows its texts as they are: `$` in a name starts no formula."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws the figure, also to measure its parts."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)


class MethodStyle(NamedTuple):
    """The look of a method in all figures: `#rrggbb` and Matplotlib's name of a marker."""

    color: str
    marker: str


def method_styles(methods: Iterable[str], others: Iterable[str] = ()) -> dict[str, MethodStyle]:
    """Assigns colors and markers: the first eight methods differ in color, 40 in both.

    `methods` come first, in the order of Table 1 and then by name; `others` take what is left.

    Example:
        >>> styles = method_styles(["trades", "at"], ["mart"])
        >>> list(styles), len({style.color for style in styles.values()})
        (['at', 'trades', 'mart'], 3)
    """
    known = list(METHOD_LABELS)

    def place(method: str) -> tuple[int, str]:
        return known.index(method) if method in known else len(known), method

    ordered = dict.fromkeys([*sorted(set(methods), key=place), *sorted(set(others), key=place)])
    # 8 and 5 have no common factor, so pairs repeat after 40.
    return {
        method: MethodStyle(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, method in enumerate(ordered)
    }


def sequential() -> Colormap:
    """The color map of epochs and losses: viridis without its pale end."""
    return ListedColormap(mpl.colormaps["viridis"].resampled(256)([i / 284 for i in range(256)]))


def make_canvas(
    width: float, height: float, panels: int = 1, *, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """Makes a figure without pyplot, which keeps figures alive and may need a display.

    Returns:
        The figure of `width` x `height` inches, and its panels row by row.
    """
    figure = PlainFigure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    columns = -(-panels // rows)
    all_axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axes in all_axes:
        axes.tick_params(labelsize=FONT - 1, width=0.6)
        axes.xaxis.label.set_fontsize(FONT)
        axes.yaxis.label.set_fontsize(FONT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_linewidth(0.6)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, all_axes


def add_legend(
    figure: Figure, columns: int = 4, without: Collection[str] = (), **look: Any
) -> None:
    """Puts one legend below all panels, instead of an earlier one.

    Args:
        figure: With labels on what is drawn.
        columns: As many as there is room for, at most this number.
        without: Labels that need no legend.
        look: Options of `Figure.legend`.
    """
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            if label not in without:
                entries.setdefault(label, handle)
    look = {"fontsize": FONT - 1, "frameon": False, "handlelength": 2.2, **look}
    for count in range(columns, 0, -1):
        for legend in list(figure.legends):
            legend.remove()
        if not entries:
            return
        legend = figure.legend(
            entries.values(), entries, loc="outside lower center", ncols=count, **look
        )
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width:
            return


def add_bar(
    figure: Figure, drawn: ScalarMappable, panels: Axes | list[Axes], label: str, **options: Any
) -> Axes:
    """Puts a color bar beside panels, and returns its axes."""
    bar = figure.colorbar(drawn, ax=panels, **options)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    bar.outline.set_visible(False)
    return bar.ax


def set_title(figure: Figure, title: str | None) -> None:
    """Puts a title above the figure, if it is not empty."""
    if title:
        # A name may hold what Matplotlib would read as mathematics, such as $\\foo$.
        figure.suptitle(title, fontsize=FONT + 1, parse_math=False)


def small_multiples(
    titles: Sequence[str], heights: Sequence[float], columns: int = 5
) -> tuple[Figure, list[list[Axes]]]:
    """Lays out a column of panels of some heights for each title, several columns a row.

    Returns:
        The figure, 6.8 inches wide, and the panels of each title from top to bottom.
    """
    columns = min(columns, len(titles))
    rows, deep = -(-len(titles) // columns), len(heights)
    figure, grid = make_canvas(
        6.8, rows * sum(heights) + 0.8, rows * deep * columns, rows=rows * deep
    )
    cast(GridSpec, grid[0].get_gridspec()).set_height_ratios([*heights] * rows)
    places = np.arange(len(grid)).reshape(rows, deep, columns).swapaxes(1, 2).reshape(-1, deep)
    for place, axes in enumerate(grid):
        axes.tick_params(labelsize=SMALL, length=2)
        if place in places[len(titles) :]:
            axes.remove()
    panels = [[grid[place] for place in own] for own in places[: len(titles)]]
    for title, own in zip(titles, panels):
        lines = textwrap.wrap(title, 22, max_lines=2, placeholder=" …")
        own[0].set_title("\n".join(lines), fontsize=SMALL + 0.5, pad=3)
    return figure, panels


def share_axes(panels: Sequence[Sequence[Axes]], x: str, *y: str, columns: int = 5) -> None:
    """Gives the panels of each row in `small_multiples` one range, and labels to the outer ones."""
    columns = min(columns, len(panels))
    for level, label in enumerate(y):
        same = [own[level] for own in panels]
        across, up = zip(*((axes.get_xlim(), axes.get_ylim()) for axes in same))
        for i, axes in enumerate(same):
            axes.set(xlim=(np.min(across), np.max(across)), ylim=(np.min(up), np.max(up)))
            # Ticks below the last panel of each column, labels in the last row alone: rows at
            # different distances would look like groups.
            lowest = level == len(y) - 1 and i + columns >= len(panels)
            last = lowest and i >= (len(panels) - 1) // columns * columns
            first = i % columns == 0
            axes.tick_params(labelbottom=lowest, labelleft=first)
            axes.set_xlabel(x if last else "", fontsize=SMALL)
            axes.set_ylabel(label if first else "", fontsize=SMALL)


# Places of a name beside its point: offset in points, and alignment.
_PLACES = (
    (5, 0, "left", "center"),
    (-5, 0, "right", "center"),
    (0, 5, "center", "bottom"),
    (0, -5, "center", "top"),
    (4, 4, "left", "bottom"),
    (4, -4, "left", "top"),
    (-4, 4, "right", "bottom"),
    (-4, -4, "right", "top"),
)


def name_points(axes: Axes, places: Array, names: Mapping[int, str]) -> list[int]:
    """Writes names beside points if they cover neither points nor other names.

    Args:
        axes: With all else drawn, so that nothing moves afterwards.
        places: Of all points, `(N, 2)`.
        names: By the index of a point.

    Returns:
        The points for whose name there was no room.
    """
    centers = axes.transData.transform(places)
    half = 2.6 * cast(Figure, axes.figure).dpi / 72
    taken = [Bbox([center - half, center + half]) for center in centers]
    # The most crowded points first, because they have the least choice.
    near = [int((np.abs(centers - center).max(axis=1) < 12 * half).sum()) for center in centers]
    left: list[int] = []
    for index in sorted(names, key=lambda i: (-near[i], i)):
        text = axes.annotate(
            names[index],
            places[index],
            (0, 0),
            textcoords="offset points",
            fontsize=SMALL,
            zorder=5,
        )
        text.set(parse_math=False, path_effects=[withStroke(linewidth=1.5, foreground="white")])
        for dx, dy, horizontal, vertical in _PLACES:
            text.xyann = (dx, dy)
            text.set(ha=horizontal, va=vertical)
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            inside = inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            text.remove()
            left.append(index)
    return left
