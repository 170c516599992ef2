"""What a figure shows, read back from it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure


def scatters(axes: Axes, gid: str | None = None) -> dict[str, np.ndarray]:
    """Where what is drawn under a label stands."""
    drawn = [c for c in axes.collections if not isinstance(c, LineCollection)]
    kept = [c for c in drawn if gid is None or c.get_gid() == gid]
    return {c.get_label(): np.asarray(c.get_offsets()) for c in kept if len(c.get_offsets())}


def names(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines(axes: Axes) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for line in axes.lines:
        found.setdefault(line.get_label(), []).append(line.get_xydata())
    return found


def slope(line: np.ndarray) -> float:
    return (line[1][1] - line[0][1]) / (line[1][0] - line[0][0])
