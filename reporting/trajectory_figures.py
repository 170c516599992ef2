"""Trajectories of many models in the plane of flatness and RLoss (Fig. 5 of the paper)."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from robust_flatness.plotting.canvas import BLACK, GREY, add_legend, sequential, set_title
from robust_flatness.reporting.models import Model
from robust_flatness.reporting.multiples import COLUMNS, SMALL, Ruler, share_axes, small_multiples
from robust_flatness.reporting.scatter import PUBLISHED
from robust_flatness.reporting.series import model_series, select_models

MOST_PANELS = 20
# Those that the paper shows, in its order.
_FIRST = ("at", "self_supervision", "at_awp", "unlabeled")
_FLATNESS, _LOSS = "flatness/average/test", "test/robust_loss"
_WARM_UP = 0.05
_PALE = "#C4C4C4"

Points = list[tuple[float, float, float]]
Published = Mapping[str, Sequence[Mapping[str, float]]]


def trajectories_figure(
    models: list[Model], published: Published | None = None, *, title: str | None = None
) -> Figure | None:
    """Draws test RLoss against flatness throughout training, a panel a model (Fig. 5).

    Points are means over seeds at the epochs that all seeds measured, coloured by the share of
    training that has passed; a ring marks the last. All panels share
    their axes, which may leave points of the first twentieth of training outside.

    Args:
        models: Of which the first of each method come first, 20 at most.
        published: Trajectories of the paper by method, rows with `progress` in [0, 1]. They are
            drawn pale behind models of that method: other data, and possibly the highest of ten
            directions where runs take the mean.
        title: A line above the figure.

    Returns:
        A figure of 6.8 inches in width, or None where no model measured both throughout training.
    """
    able = [model for model in models if _points(model)]
    shown = select_models(able, _FIRST, MOST_PANELS)
    if not shown:
        return None
    figure, panels = small_multiples([model.label for model in shown], heights=(1.35,))
    for model, (axes,) in zip(shown, panels):
        rows = _published_points((published or {}).get(model.method, ()))
        _draw_published(axes, rows)
        dots = _draw_points(axes, model)
        _fit(axes, model, rows)
    share_axes(panels, Ruler("average-case flatness", _set_axis), Ruler("test RLoss", _set_axis))
    _add_bar(figure, dots)
    add_legend(figure)
    set_title(figure, title)
    return figure


def _draw_points(axes: Axes, model: Model) -> PathCollection:
    shares, flatness, losses = zip(*_points(model))
    axes.plot(flatness, losses, color=GREY, linewidth=0.6, alpha=0.7, zorder=2)
    look: dict[str, Any] = {"s": 13, "edgecolors": "white", "linewidths": 0.3, "zorder": 3}
    ring: dict[str, Any] = {"markersize": 5.5, "fillstyle": "none", "color": BLACK, "zorder": 4}
    axes.plot(flatness[-1], losses[-1], "o", label="end of training", linewidth=0.8, **ring)
    return axes.scatter(flatness, losses, c=shares, cmap=sequential(), vmin=0, vmax=1, **look)


def _draw_published(axes: Axes, points: Points) -> None:
    if points:
        _, flatness, losses = zip(*points)
        look: dict[str, Any] = {"markersize": 2.2, "linewidth": 0.6, "zorder": 1}
        axes.plot(flatness, losses, "o-", color=_PALE, label=PUBLISHED, **look)


def _fit(axes: Axes, model: Model, published: Points) -> None:
    """Limits that hold all points but those of the first epochs, which may lie far away."""
    points = _points(model)
    kept = [point for point in points if point[0] > _WARM_UP] or points
    _, flatness, losses = zip(*kept, *published)
    for set_limits, values in ((axes.set_xlim, flatness), (axes.set_ylim, losses)):
        margin = 0.08 * (max(values) - min(values)) or 0.1
        set_limits(min(0.0, min(values)) - margin, max(values) + margin)


def _published_points(rows: Sequence[Mapping[str, float]]) -> Points:
    names = ("progress", _FLATNESS, _LOSS)
    found = ([row[name] for name in names] for row in rows if row.keys() >= set(names))
    return sorted((share, flatness, loss) for share, flatness, loss in found)


def _points(model: Model) -> Points:
    """Share of training, flatness and RLoss, by epoch."""
    flatness, losses = model_series(model, _FLATNESS), model_series(model, _LOSS)
    if flatness is None or losses is None:
        return []
    of_share = dict(zip(losses.shares, losses.mean))
    pairs = zip(flatness.shares, flatness.mean)
    return [(share, value, of_share[share]) for share, value in pairs if share in of_share]


def _add_bar(figure: Figure, dots: PathCollection) -> None:
    ticks = MultipleLocator(0.5)
    panels = list(figure.axes)
    bar = figure.colorbar(
        dots,
        ax=panels,
        pad=0.01,
        aspect=35,
        shrink=0.6 if len(panels) > 2 * COLUMNS else 1.0,
        ticks=ticks,
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    bar.set_label("share of training", fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def _set_axis(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
