"""What the figures over models share: where each model stands, and how it is drawn there.

Example:
    >>> Quantity("test/robust_loss").axis_label
    'test RLoss'
"""

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from robust_flatness.plotting.canvas import FONT, GREY, method_style
from robust_flatness.reporting.models import Point, method_label
from robust_flatness.reporting.runs import Weights

PUBLISHED = "published (CIFAR-10)"
METHOD = "method"  # marks what stands for models of a method
_LABELS = {
    "flatness/average/test": "average-case flatness in RLoss",
    "flatness/average/train": "average-case flatness in RLoss, training images",
    "flatness/worst/test": "worst-case flatness in RLoss",
    "flatness/worst/train": "worst-case flatness in RLoss, training images",
    "flatness/clean_average/test": "average-case flatness in the clean loss",
    "flatness/clean_worst/test": "worst-case flatness in the clean loss",
    "hessian/max_eigenvalue": "largest eigenvalue of the Hessian",
    "hessian/min_eigenvalue": "smallest eigenvalue of the Hessian",
    "test/error": "clean test error",
    "test/robust_error": "test RErr",
    "test/autoattack_error": "test RErr (AutoAttack)",
    "test/robust_loss": "test RLoss",
    "train_eval/robust_error": "train RErr",
    "train_eval/robust_loss": "train RLoss",
}


@dataclass(frozen=True)
class Quantity:
    """What an axis shows: a figure of each model, or how far it exceeds another one.

    Attributes:
        name: Of the figure, such as `test/robust_loss`.
        weights: That it was measured at.
        minus: Name and weights of the figure that is subtracted.
        label: On the axis; that of the figure where empty.
    """

    name: str
    weights: Weights = "final"
    minus: tuple[str, Weights] | None = None
    label: str = ""

    @property
    def axis_label(self) -> str:
        """What the axis says."""
        return self.label or _LABELS.get(self.name, self.name)

    def of(self, point: Point) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds, the latter 0 where it is not known.

        Differences are taken seed by seed where the model has its runs.
        """
        if self.minus is not None and hasattr(point, "runs"):
            return _mean_and_deviation(self._differences(point.runs))
        mean = point.mean(self.name, self.weights)
        if self.minus is None:
            deviation = getattr(point, "deviation", lambda *_: None)(self.name, self.weights)
            return None if mean is None else (mean, deviation or 0.0)
        other = point.mean(*self.minus)
        return None if mean is None or other is None else (mean - other, 0.0)

    def _differences(self, runs: Iterable[Any]) -> list[float]:
        name, weights = self.minus or (self.name, self.weights)
        pairs = (
            (r.figures(self.weights).get(self.name), r.figures(weights).get(name)) for r in runs
        )
        return [a - b for a, b in pairs if a is not None and b is not None]


class Spot(NamedTuple):
    """A model in the plane of a figure, with standard deviations over its seeds, 0 if unknown."""

    point: Point
    x: float
    y: float
    x_deviation: float
    y_deviation: float


def place(points: Iterable[Point], x: Quantity, y: Quantity) -> list[Spot]:
    """Finds where models stand, without those that lack either quantity."""
    found = ((point, x.of(point), y.of(point)) for point in points)
    return [Spot(p, a[0], b[0], a[1], b[1]) for p, a, b in found if a is not None and b is not None]


def by_method(spots: Iterable[Spot]) -> dict[str, list[Spot]]:
    """Sorts models by their methods, in the order in which these come."""
    groups: dict[str, list[Spot]] = {}
    for spot in spots:
        groups.setdefault(spot.point.method, []).append(spot)
    return groups


def draw_models(axes: Axes, spots: Sequence[Spot], **look: Any) -> None:
    """Draws models in the colours and markers of their methods, with bars over seeds.

    Args:
        axes: To draw on.
        spots: Models.
        look: Of the markers, for `Axes.scatter`.
    """
    for method, group in by_method(spots).items():
        colour, marker = method_style(method)
        _draw_deviations(axes, group, colour)
        style: dict[str, Any] = {"color": colour, "edgecolors": "white", "linewidths": 0.5, **look}
        style |= {"marker": marker, "label": method_label(method), "gid": METHOD}
        places = ([spot.x for spot in group], [spot.y for spot in group])
        axes.scatter(*places, s=30, zorder=4, **style)


def draw_grey(axes: Axes, spots: Sequence[Spot], label: str) -> None:
    """Draws models as faint rings behind the others."""
    if spots:
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "#B0B0B0", "linewidths": 0.7}
        places = ([spot.x for spot in spots], [spot.y for spot in spots])
        axes.scatter(*places, s=14, label=label, zorder=1, **ring)


def draw_trend(axes: Axes, spots: Sequence[Spot], at_least: int = 3, **look: Any) -> None:
    """Draws the least-squares line through models, as far as they reach, if there are enough."""
    x, y = np.array([spot.x for spot in spots]), np.array([spot.y for spot in spots])
    if len(x) >= at_least and x.min() < x.max():
        ends = np.array([x.min(), x.max()])
        style: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2, "color": GREY, **look}
        axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), zorder=2, **style)


def set_axes(axes: Axes, x: Quantity, y: Quantity) -> None:
    """Names both axes, errors in percent."""
    axes.margins(0.06, 0.08)
    _set_axis(axes.xaxis, x)
    _set_axis(axes.yaxis, y)


def add_method_legend(figure: Figure, methods: Collection[str] | None = None) -> None:
    """Puts one legend of small type below all panels, in place of the one before.

    Args:
        figure: Whose panels say what is drawn.
        methods: That it names, all unless given: others are named where they stand.
    """
    shown = None if methods is None else {method_label(method) for method in methods}
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            if shown is None or label in shown or handle.get_gid() != METHOD:
                entries.setdefault(label, handle)
    look: dict[str, Any] = {"fontsize": FONT - 1.5, "frameon": False, "loc": "outside lower center"}
    look |= {"handlelength": 1.4, "columnspacing": 1.2, "handletextpad": 0.4, "labelspacing": 0.35}
    for columns in range(5, 0, -1):
        _remove_legends(figure)
        if not entries:
            return
        legend = figure.legend(entries.values(), entries, ncols=columns, **look)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width:
            return


def _remove_legends(figure: Figure) -> None:
    for legend in list(figure.legends):
        legend.remove()


def _draw_deviations(axes: Axes, spots: Sequence[Spot], colour: str) -> None:
    known = [spot for spot in spots if spot.x_deviation or spot.y_deviation]
    if known:
        _, x, y, dx, dy = zip(*known)
        bars: dict[str, Any] = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.6, "zorder": 3}
        axes.errorbar(x, y, xerr=dx, yerr=dy, ecolor=colour, **bars)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _set_axis(axis: Axis, quantity: Quantity) -> None:
    axis.set_label_text(quantity.axis_label)
    if quantity.name.endswith("error"):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
