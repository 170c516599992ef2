"""Size, colours, and legend of all figures.

Example:
    >>> figure, all_axes = make_canvas(6.8, 3.3, panels=2)
    >>> len(all_axes)
    2
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from robust_flatness.run_folder.metrics import METHOD_LABELS

# Okabe and Ito's colours, which colour-blind readers and grey prints keep apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
FONT = 9  # points, at the printed width

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

    colour: str
    marker: str


def method_styles(methods: Iterable[str], others: Iterable[str] = ()) -> dict[str, MethodStyle]:
    """Assigns colours and markers: the first eight methods differ in colour, 40 in both.

    `methods` come first, in the order of Table 1 and then by name; `others` take what is left.

    Example:
        >>> styles = method_styles(["trades", "at"], ["mart"])
        >>> list(styles), len({style.colour for style in styles.values()})
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
    """The colour map of epochs and losses: viridis without its pale end."""
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


def add_legend(figure: Figure, columns: int = 4) -> None:
    """Puts one legend below all panels."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    look: dict[str, Any] = {"fontsize": FONT - 1, "frameon": False, "handlelength": 2.2}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, **look)


def add_bar(
    figure: Figure, drawn: ScalarMappable, panels: Axes | list[Axes], label: str, **options: Any
) -> Axes:
    """Puts a colour bar beside panels, and returns its axes."""
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
