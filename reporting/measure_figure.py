"""What flatness measures, drawn from a run's own landscape (Fig. 3 of the paper)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_flatness.plotting.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREY,
    ORANGE,
    make_canvas,
    set_title,
)
from robust_flatness.reporting.models import method_label
from robust_flatness.reporting.runs import Run
from robust_flatness.run_folder.landscape_file import Array, Landscape

_SMALL = FONT - 1


def schematic_figure(run: Run) -> Figure | None:
    """Draws the measure: how far RLoss rises from the weights w to w + ν.

    One random direction ν is drawn in full, the others pale. The height marked is that of w + ν
    above w, both attacked anew; its mean over directions is average-case flatness at the ξ that
    the landscape's directions are long.

    Args:
        run: With the landscape of its last weights along random directions.

    Returns:
        A figure of 5.2 x 3.2 inches, or None where the run has no such landscape, or it does not
        reach from -ν to ν.
    """
    landscape = run.landscapes().get("final/random")
    if landscape is None or not _usable(landscape):
        return None
    steps = landscape.coordinates
    curves = landscape.losses.mean(axis=2)
    before, here, beyond = (_at(steps, curves, step) for step in (-1.0, 0.0, 1.0))
    # The direction of median height is the most typical of them.
    typical = int(np.argsort(beyond)[len(beyond) // 2])
    figure, (axes,) = make_canvas(5.2, 3.2)
    axes.plot(steps, np.delete(curves, typical, axis=0).T, color=GREY, linewidth=0.6, alpha=0.5)
    axes.plot(steps, curves[typical], color=BLUE, linewidth=1.8)
    low, left, high = here[typical], before[typical], beyond[typical]
    axes.plot([0.0], [low], "o", color=BLACK, markersize=7, zorder=4)
    axes.plot([-1.0, 1.0], [left, high], "o", color=BLUE, markersize=7, zorder=4)
    _label_points(axes, low, left, high)
    _mark_height(axes, low, high, float((beyond - here).mean()), len(curves))
    _set_axes(axes)
    set_title(figure, f"{method_label(run.method)} on {run.data}")
    return figure


def _label_points(axes: Axes, low: float, left: float, high: float) -> None:
    style: dict[str, Any] = {"fontsize": FONT, "textcoords": "offset points"}
    axes.annotate("w", (0.0, low), xytext=(0, -14), ha="center", **style)
    axes.annotate("w − ν", (-1.0, left), xytext=(-8, 0), ha="right", va="center", **style)
    axes.annotate("w + ν", (1.0, high), xytext=(8, 0), ha="left", va="center", **style)


def _mark_height(axes: Axes, low: float, high: float, flatness: float, directions: int) -> None:
    """The height of w + ν above w, and its mean over directions."""
    axes.plot([0.0, 1.08], [low, low], color=BLACK, linewidth=0.7, linestyle=":")
    arrow: dict[str, Any] = {"arrowstyle": "<->", "color": ORANGE, "linewidth": 1.4}
    axes.annotate("", (1.0, low), xytext=(1.0, high), arrowprops=arrow)
    text = (
        f"RLoss(w + ν) − RLoss(w) = {high - low:.2f}\n"
        f"mean over {directions} directions ν = {flatness:.2f},\nthe average-case flatness"
    )
    # Above the valley, where no line runs.
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _SMALL, "color": ORANGE}
    axes.text(0.0, low + 0.75 * (high - low), text, **look)


def _set_axes(axes: Axes) -> None:
    axes.set_xlabel("step s along a random direction ν, ‖ν‖ = ξ‖w‖ in each layer")
    axes.set_ylabel("RLoss at w + s · ν")
    axes.set_xticks([-1.0, 0.0, 1.0])
    axes.set_xlim(-1.3, 1.3)
    axes.margins(y=0.14)


def _at(steps: Array, curves: Array, step: float) -> Array:
    """Each direction's loss at a step, `(D,)`, between two measured ones where need be."""
    return np.array([np.interp(step, steps, curve) for curve in curves])


def _usable(landscape: Landscape) -> bool:
    steps = landscape.coordinates
    reaches = len(steps) > 1 and steps[0] <= -1 + 1e-9 and steps[-1] >= 1 - 1e-9
    return bool(reaches and np.isfinite(landscape.losses).all())
