"""Figures with a point for each model (Figs. 1, 6 and 7 of the paper and of its long version).

Each function takes models and a `title`, and returns a figure of 6.8 x 4.6 inches. Models that lack
a metric are left out; a figure of no models is None.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from robust_flatness.plotting.canvas import FONT, GREY, make_canvas, method_styles, set_title
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.sweeps import find_sweeps
from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import method_label, metric

PUBLISHED = "published (CIFAR-10)"
METHOD = "method"  # the gid of points of a method

_FLATNESS, _TRAIN_FLATNESS = "flatness/average/test", "flatness/average/train"
_LOSS, _ERROR = "test/robust_loss", "test/robust_error"
_FEW = 20  # models that can all be labelled
# Places of a label beside its point: offset in points, and alignment.
_OFFSETS = (
    (5, 0, "left", "center"),
    (-5, 0, "right", "center"),
    (0, 5, "center", "bottom"),
    (0, -5, "center", "top"),
    (4, 4, "left", "bottom"),
    (4, -4, "left", "top"),
    (-4, 4, "right", "bottom"),
    (-4, -4, "right", "top"),
)


def flatness_figure(
    models: Models,
    x: str = _FLATNESS,
    y: str = _LOSS,
    *,
    published: Models | None = None,
    title: str | None = None,
) -> Figure | None:
    """Draws robust loss against flatness, with their correlation (Figs. 1 and 7).

    Bars are ± one standard deviation over seeds. Models of the paper, `published`, are faint rings
    behind ours; they are of CIFAR-10, so compare shapes rather than places.
    """
    points = models.points(x, y)
    if points.empty:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, models, points, x, y)
    theirs = None if published is None else published.points(x, y)
    if theirs is not None and len(theirs):
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "#B0B0B0", "linewidths": 0.7}
        axes.scatter(theirs["x"], theirs["y"], s=14, label=PUBLISHED, zorder=1, **ring)
    if x.startswith("flatness/"):
        axes.set_xlabel(f"{metric(x).title} (lower is flatter)")
    sources = {"": models} if published is None else {"": models, f"{PUBLISHED}: ": published}
    results = {of: correlate(source, x, y) for of, source in sources.items()}
    lines = [f"{of}{result.text}, {result.over}" for of, result in results.items() if result]
    axes.set_title("\n".join(lines), loc="left", fontsize=FONT - 1, color=GREY)
    return _finish(figure, axes, points, title)


def kink_figure(models: Models, num_classes: int, *, title: str | None = None) -> Figure | None:
    """Draws robust error against robust loss, with a least-squares line on either side of ln K.

    Beyond ln K, the RLoss of guessing, models are wrong with confidence: the loss rises on while
    the error hardly does (Fig. 7; the paper splits at 2.3 = ln 10). Lines need three models on
    their side.
    """
    points = models.points(_LOSS, _ERROR)
    if points.empty:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, models, points, _LOSS, _ERROR)
    kink = math.log(num_classes)
    axes.axvline(kink, label=f"guessing (ln {num_classes})", **_REFERENCE)
    for side in (points[points["x"] <= kink], points[points["x"] > kink]):
        _draw_trend(axes, side, label="least squares on either side")
    return _finish(figure, axes, points, title)


def train_flatness_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws flatness on training images against flatness on test images, with the diagonal."""
    points = models.points(_FLATNESS, _TRAIN_FLATNESS)
    if points.empty:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, models, points, _FLATNESS, _TRAIN_FLATNESS)
    axes.axline((0, 0), slope=1, label="equally flat on both", **_REFERENCE)
    return _finish(figure, axes, points, title)


def gap_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws two gaps of robust loss against flatness: test - train, and last - early-stopped.

    A gap that no model has gets no panel.
    """
    gaps = ("gap/robust_loss", "last_minus_best/robust_loss")
    panels = {gap: points for gap in gaps if len(points := models.points(_FLATNESS, gap))}
    if not panels:
        return None
    figure, all_axes = make_canvas(6.8, 4.0, len(panels))
    for axes, (gap, points) in zip(all_axes, panels.items()):
        _draw_plane(axes, models, points, _FLATNESS, gap)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    _add_legend(figure)
    set_title(figure, title)
    return figure


def early_stopping_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws an arrow from each model's last weights to its early-stopped ones."""
    best = models.points(_FLATNESS, _LOSS, "early_stopped")
    last = models.points(_FLATNESS, _LOSS)
    last = last[last.index.isin(best.index)]
    if last.empty:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, models, last, _FLATNESS, _LOSS)
    styles = method_styles(models.methods)
    for label, start in last.iterrows():
        end, (colour, marker) = best.loc[label], styles[start["method"]]
        ring: dict[str, Any] = {"marker": marker, "facecolors": "white", "edgecolors": colour}
        axes.scatter([end["x"]], [end["y"]], s=22, linewidths=0.9, zorder=3, **ring)
        if (start["x"], start["y"]) != (end["x"], end["y"]):
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 0.9, "mutation_scale": 8}
            arrow |= {"shrinkA": 0, "shrinkB": 3}
            places = ((end["x"], end["y"]), (start["x"], start["y"]))
            axes.annotate("", *places, arrowprops=arrow, zorder=3)
    look: dict[str, Any] = {"s": 22, "edgecolors": GREY, "linewidths": 0.9}
    axes.scatter([], [], facecolors=GREY, label="last weights", **look)
    axes.scatter([], [], facecolors="white", label="early-stopped weights", **look)
    return _finish(figure, axes, last, title)


def hyperparameter_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws sweeps, from light to dark with the value of the setting, with a line through each."""
    placed = models.points(_FLATNESS, _LOSS)
    sweeps = find_sweeps(models, placed.index)
    if not sweeps:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    styles = method_styles(models.methods)
    names: dict[str, str] = {}
    for sweep in sweeps:
        points = placed.loc[list(sweep)]
        colour = styles[points["method"].iloc[0]].colour
        _draw_trend(axes, points, at_least=2, color=colour)
        shades = [_lighter(colour, share) for share in np.linspace(0.7, 0, len(points))]
        look: dict[str, Any] = {"color": None, "facecolors": shades, "edgecolors": colour}
        _draw_points(axes, models, points, **look, linewidths=0.8)
        names |= sweep
    if len(names) > _FEW:
        ends = [label for sweep in map(list, sweeps) for label in (sweep[0], sweep[-1])]
        names = {label: names[label] for label in ends}
    _set_axes(axes, _FLATNESS, _LOSS)
    note = "light to dark: from the lowest to the highest value; dotted: least squares"
    axes.set_title(note, loc="left", fontsize=FONT - 1, color=GREY)
    set_title(figure, title)
    _add_legend(figure)
    everything = placed.loc[[label for sweep in sweeps for label in sweep]]
    _label_points(figure, axes, everything, names)
    return figure


_REFERENCE: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 0.9, "zorder": 1}


def _draw_plane(axes: Axes, models: Models, points: pd.DataFrame, x: str, y: str) -> None:
    _draw_points(axes, models, points)
    _set_axes(axes, x, y)


def _draw_points(axes: Axes, models: Models, points: pd.DataFrame, **look: Any) -> None:
    """Draws models in the colours and markers of their methods, with bars over seeds."""
    styles = method_styles(models.methods)
    for method, own in points.groupby("method", sort=False):
        colour, marker = styles[str(method)]
        bars = own[(own["dx"] > 0) | (own["dy"] > 0)]
        if len(bars):
            bar: dict[str, Any] = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.6, "zorder": 3}
            axes.errorbar(bars["x"], bars["y"], bars["dy"], bars["dx"], ecolor=colour, **bar)
        style: dict[str, Any] = {"color": colour, "edgecolors": "white", "linewidths": 0.5, **look}
        style |= {"marker": marker, "label": method_label(str(method)), "gid": METHOD}
        axes.scatter(own["x"], own["y"], s=30, zorder=4, **style)


def least_squares(points: pd.DataFrame, at_least: int = 3) -> tuple[Array, Array] | None:
    """The ends `x` and `y` of the line through points, if there are enough of them."""
    x, y = points["x"], points["y"]
    if len(points) < at_least or x.min() == x.max():
        return None
    ends = np.array([x.min(), x.max()])
    return ends, np.polyval(np.polyfit(x, y, 1), ends)


def _draw_trend(axes: Axes, points: pd.DataFrame, at_least: int = 3, **look: Any) -> None:
    if (line := least_squares(points, at_least)) is not None:
        style: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2, "color": GREY, **look}
        axes.plot(*line, zorder=2, **style)


def _set_axes(axes: Axes, x: str, y: str) -> None:
    """Labels both axes; shares are in percent."""
    axes.margins(0.06, 0.08)
    pairs: Iterable[tuple[Axis, str]] = ((axes.xaxis, x), (axes.yaxis, y))
    for axis, name in pairs:
        axis.set_label_text(metric(name).title)
        if metric(name).is_share:
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _finish(figure: Figure, axes: Axes, points: pd.DataFrame, title: str | None) -> Figure:
    """Labels the points, and puts methods into the legend whose points have no label."""
    set_title(figure, title)
    _add_legend(figure)
    unlabelled = _label_points(figure, axes, points, {label: label for label in points.index})
    _add_legend(figure, set(points.loc[unlabelled, "method"]))
    return figure


def _add_legend(figure: Figure, methods: Collection[str] | None = None) -> None:
    """Puts one legend below all panels, instead of an earlier one."""
    shown = None if methods is None else {method_label(method) for method in methods}
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            if shown is None or label in shown or handle.get_gid() != METHOD:
                entries.setdefault(label, handle)
    look: dict[str, Any] = {"fontsize": FONT - 1.5, "frameon": False, "loc": "outside lower center"}
    look |= {"handlelength": 1.4, "columnspacing": 1.2, "handletextpad": 0.4, "labelspacing": 0.35}
    for columns in range(5, 0, -1):
        for legend in list(figure.legends):
            legend.remove()
        if not entries:
            return
        legend = figure.legend(entries.values(), entries, ncols=columns, **look)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width:
            return


def _label_points(
    figure: Figure, axes: Axes, points: pd.DataFrame, names: Mapping[str, str]
) -> list[str]:
    """Writes names beside points if they cover neither points nor other names.

    Returns:
        The labels without a name, because there was no room.
    """
    figure.draw_without_rendering()
    centres = axes.transData.transform(points[["x", "y"]].to_numpy(dtype=float))
    half = 2.6 * figure.dpi / 72
    taken = [Bbox([centre - half, centre + half]) for centre in centres]
    # The most crowded points first, because they have the least choice.
    near = [int((np.abs(centres - centre).max(axis=1) < 12 * half).sum()) for centre in centres]
    crowded = sorted(range(len(points)), key=lambda i: -near[i])
    labels = [points.index[i] for i in crowded if points.index[i] in names]
    return [
        label for label in labels if not _write_name(axes, points.loc[label], names[label], taken)
    ]


def _write_name(axes: Axes, point: pd.Series, name: str, taken: list[Bbox]) -> bool:
    text = axes.annotate(
        name, (point["x"], point["y"]), (0, 0), textcoords="offset points", fontsize=FONT - 2
    )
    text.set(
        zorder=5, parse_math=False, path_effects=[withStroke(linewidth=1.5, foreground="white")]
    )
    for dx, dy, horizontal, vertical in _OFFSETS:
        text.xyann = (dx, dy)
        text.set(ha=horizontal, va=vertical)
        box = text.get_window_extent()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        inside = inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        if inside and not box.count_overlaps(taken):
            taken.append(box)
            return True
    text.remove()
    return False


def _lighter(colour: str, share: float) -> str:
    """Mixes a colour with a share of white."""
    red, green, blue = (share + (1 - share) * part for part in to_rgb(colour))
    return to_hex((red, green, blue))
