"""Loss landscapes around the weights: curves with bands, and surfaces (Fig. 4 of the paper).

Example:
    >>> steps = np.linspace(-1, 1, 5)
    >>> bowl = Landscape(steps, 1 + np.ones((3, 1, 2)) * steps[None, :, None] ** 2)
    >>> landscape_figure({"random": {"AT": bowl}}).axes[0].get_ylabel()
    'RLoss'
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from robust_flatness.plotting.canvas import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    add_bar,
    add_legend,
    make_canvas,
    sequential,
    set_title,
)
from robust_flatness.run_folder.files import Array, Landscape

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
# The paper cuts its figures at a loss of 15.
_HIGHEST = 15.0
_LOWEST = 1e-3
NAMES = {
    "random": "random directions",
    "adversarial": "adversarial directions",
    "hessian": "the Hessian's first eigenvector",
}


def landscape_figure(
    panels: Mapping[str, Mapping[str, Landscape]],
    *,
    title: str | None = None,
    loss_name: str = "RLoss",
) -> Figure | None:
    """Draws the loss along directions through the weights, on a logarithmic axis cut at 15.

    A line is the mean over directions, in a panel called `adversarial` the highest of them; its
    band reaches from the lowest direction to the highest.

    Args:
        panels: By kind of direction, landscapes with losses `(D, S, N)` by label.
        title: A line above the figure.
        loss_name: What the loss is called on its axis.

    Returns:
        A figure of 3.3 inches in height, or None if there is nothing finite to draw.
    """
    shown = {kind: lines for kind, lines in panels.items() if any(map(_finite, lines.values()))}
    if not shown:
        return None
    figure, all_axes = make_canvas(4.6 if len(shown) == 1 else 3.4 * len(shown), 3.3, len(shown))
    labels = list(dict.fromkeys(label for lines in shown.values() for label in lines))
    for axes, (kind, lines) in zip(all_axes, shown.items()):
        for label, landscape in lines.items():
            if _finite(landscape):
                _draw_line(axes, kind, label, landscape, _COLOURS[labels.index(label) % 7])
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
        axes.set_xlabel(f"step s along {NAMES.get(kind, kind)}")
        axes.margins(x=0)
    set_loss_axes(all_axes, [line.curves for lines in shown.values() for line in lines.values()])
    all_axes[0].set_ylabel(loss_name)
    add_legend(figure)
    set_title(figure, title)
    return figure


def surface_figure(
    surface: Landscape, *, title: str | None = None, loss_name: str = "RLoss"
) -> Figure | None:
    """Draws the loss on a plane through the weights, the weights marked in the middle.

    Args:
        surface: With losses `(S, S, N)`, first along the horizontal axis.
        title: A line above the figure.
        loss_name: What the loss is called.

    Returns:
        A figure of 4.4 x 3.6 inches, or None if there is nothing finite to draw.
    """
    losses = np.clip(surface.curves, _LOWEST, _HIGHEST)
    if not np.isfinite(losses).all():
        return None
    low, high = losses.min(), max(losses.max(), losses.min() * 1.01)
    levels = np.geomspace(low, high, 13)
    figure, (axes,) = make_canvas(4.4, 3.6, 1)
    grid = (surface.coordinates, surface.coordinates, losses.T)
    filled = axes.contourf(*grid, levels=levels, norm=LogNorm(low, high), cmap=sequential())
    axes.contour(*grid, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    axes.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.4)
    axes.grid(False)
    axes.set_aspect("equal")
    axes.set_xlabel("step along the first direction")
    axes.set_ylabel("step along the second direction")
    _set_step_axis(axes.xaxis)
    _set_step_axis(axes.yaxis)
    form = FuncFormatter(lambda value, _: f"{value:.2g}")
    add_bar(figure, filled, axes, loss_name, pad=0.02, format=form)
    set_title(figure, title)
    return figure


def drawn_line(kind: str, landscape: Landscape) -> Array:
    """The mean over directions, or the highest of `adversarial` ones: a loss for each step."""
    curves = landscape.curves
    return np.asarray(curves.max(axis=0) if kind == "adversarial" else curves.mean(axis=0))


def set_loss_axes(all_axes: Sequence[Axes], curves: Sequence[Array]) -> None:
    """Sets one logarithmic range of all losses, of which some are finite, and ticks of steps."""
    values = np.concatenate([losses[np.isfinite(losses)] for losses in curves])
    low, high = max(values.min() / 1.15, _LOWEST), min(values.max() * 1.15, _HIGHEST)
    for axes in all_axes:
        axes.set_yscale("log")
        # If all losses lie above the cut, they are shown all the same.
        axes.set_ylim(low, high if high > 1.2 * low else 1.3 * max(values.max(), low))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
        _set_step_axis(axes.xaxis)


def _draw_line(axes: Axes, kind: str, label: str, landscape: Landscape, color: str) -> None:
    curves, steps = landscape.curves, landscape.coordinates
    line = drawn_line(kind, landscape)
    axes.plot(steps, line, color=color, linewidth=1.6, label=label, zorder=3)
    if len(curves) > 1:
        band = (curves.min(axis=0), curves.max(axis=0))
        axes.fill_between(steps, *band, color=color, alpha=0.15, linewidth=0, zorder=2)


def _set_step_axis(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _: object = None) -> str:
    return f"{value:.3g}"


def _finite(landscape: Landscape) -> bool:
    return bool(np.isfinite(landscape.curves).any())
