"""What all figures share: size, colours, legend.

Example:
    >>> figure, all_axes = make_canvas(6.8, 3.3, panels=2)
    >>> len(all_axes)
    2
"""

from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from robust_flatness.plotting.method_labels import METHOD_LABELS

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
FONT = 9  # points, at the printed width

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v")


class PlainFigure(Figure):
    """A figure whose texts are shown as they are: a `$` in the name of a method is no formula."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws the figure, also to find out how large its parts are."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)


class MethodStyle(NamedTuple):
    """How a method looks in every figure.

    Attributes:
        colour: As `#rrggbb`.
        marker: Matplotlib's name of a marker.
    """

    colour: str
    marker: str


def method_style(method: str) -> MethodStyle:
    """Colour and marker of a method, the same in all figures of all reports.

    The methods of the paper all look different; others share their looks by name.

    Args:
        method: Such as `at_awp`.

    Example:
        >>> len({method_style(method) for method in METHOD_LABELS})
        28
    """
    known = list(METHOD_LABELS)
    index = known.index(method) if method in known else len(known) + sum(map(ord, method))
    return MethodStyle(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])


def sequential() -> Colormap:
    """Colours of epochs and losses, from dark to light.

    Without the last tenth of viridis, which is too pale on paper.
    """
    return ListedColormap(mpl.colormaps["viridis"].resampled(256)([i / 284 for i in range(256)]))


def make_canvas(
    width: float, height: float, panels: int = 1, *, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """Makes a figure without pyplot, which keeps every figure alive and may want a display.

    Args:
        width: In inches.
        height: In inches.
        panels: In all.
        rows: That they are laid out in.

    Returns:
        The figure, and its panels row by row.
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


def add_legend(figure: Figure, columns: int = 4) -> None:
    """Puts one legend below all panels, where it covers no line."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    look: dict[str, Any] = {"fontsize": FONT - 1, "frameon": False, "handlelength": 2.2}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, **look)


def set_title(figure: Figure, title: str | None) -> None:
    """Puts a line above the figure, if there is one."""
    if title:
        # A name may hold what Matplotlib would read as mathematics, such as $\\foo$.
        figure.suptitle(title, fontsize=FONT + 1, parse_math=False)
