"""Figures over models, a point each (Figs. 1 and 7 of the paper, and those of its long version).

Models that lack what is shown are left out, and where all do, there is no figure. Published models
are faint rings behind ours, on the same axes; they are of CIFAR-10, so compare shapes
rather than places.

Example:
    >>> from types import SimpleNamespace
    >>> figures = {"flatness/average/test": 0.5, "test/robust_loss": 1.6}
    >>> model = SimpleNamespace(method="at", label="AT", mean=lambda name, _: figures.get(name))
    >>> flatness_figure([model]).axes[0].get_ylabel()
    'test RLoss'
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_flatness.plotting.canvas import FONT, GREY, make_canvas, method_style, set_title
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.labels import label_models
from robust_flatness.reporting.models import Point
from robust_flatness.reporting.scatter import (
    PUBLISHED,
    Quantity,
    Spot,
    add_method_legend,
    draw_grey,
    draw_models,
    draw_trend,
    place,
    set_axes,
)

Points = Sequence[Point]

_FLATNESS, _LOSS = "flatness/average/test", "test/robust_loss"


def flatness_figure(
    points: Points,
    x: str = _FLATNESS,
    y: str = _LOSS,
    *,
    published: Points = (),
    title: str | None = None,
) -> Figure | None:
    """Draws robust loss against flatness over all models, with their correlation (Figs. 1 and 7).

    Bars are ± one standard deviation over seeds, where a model has several.

    Args:
        points: Models.
        x: Figure on the horizontal axis, such as `flatness/worst/test`.
        y: Figure on the vertical axis, such as `test/robust_error`.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where no model has both figures.
    """
    quantities = (Quantity(x), Quantity(y))
    spots = place(points, *quantities)
    if not spots:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, spots, published, *quantities)
    if x.startswith("flatness/"):
        axes.set_xlabel(f"{quantities[0].axis_label} (lower is flatter)")
    lines = (_correlation(points, x, y), _correlation(published, x, y, f"{PUBLISHED}: "))
    axes.set_title("\n".join(filter(None, lines)), loc="left", fontsize=FONT - 1, color=GREY)
    return _finish(figure, axes, spots, title)


def kink_figure(
    points: Points,
    *,
    num_classes: int = 10,
    y: str = "test/robust_error",
    published: Points = (),
    title: str | None = None,
) -> Figure | None:
    """Draws robust error against robust loss, and a least-squares line on either side of ln K.

    Beyond ln K, the RLoss of guessing, models are wrong with confidence: the loss rises on while
    the error hardly does (Fig. 7; the paper splits at 2.3 = ln 10).

    Args:
        points: Models.
        num_classes: Number K of classes.
        y: The robust error, by PGD or, as `test/autoattack_error`, by AutoAttack.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where no model has both figures. Lines need three
        models on their side.

    Raises:
        ValueError: If `num_classes` is below 2.
    """
    if num_classes < 2:
        raise ValueError(f"Expected `num_classes` to be >= 2 but got {num_classes}.")
    quantities = (Quantity(_LOSS), Quantity(y))
    spots = place(points, *quantities)
    if not spots:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, spots, published, *quantities)
    kink = math.log(num_classes)
    line: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 0.9, "zorder": 1}
    axes.axvline(kink, label=f"guessing (ln {num_classes})", **line)
    for side in ([s for s in spots if s.x <= kink], [s for s in spots if s.x > kink]):
        draw_trend(axes, side, label="least squares on either side")
    return _finish(figure, axes, spots, title)


def train_flatness_figure(
    points: Points, *, published: Points = (), title: str | None = None
) -> Figure | None:
    """Draws flatness on training images against flatness on test images, with the diagonal.

    Args:
        points: Models.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where no model has both figures.
    """
    x = Quantity(_FLATNESS, label="average-case flatness in RLoss, test images")
    y = Quantity("flatness/average/train", label="average-case flatness in RLoss, training images")
    spots = place(points, x, y)
    if not spots:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _draw_plane(axes, spots, published, x, y)
    line: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 0.9, "zorder": 1}
    axes.axline((0, 0), slope=1, label="equally flat on both", **line)
    return _finish(figure, axes, spots, title)


def gap_figure(
    points: Points, *, x: str = _FLATNESS, published: Points = (), title: str | None = None
) -> Figure | None:
    """Draws two gaps of robust loss against flatness: test - train, and last - best.

    The first is the robust generalisation gap on fixed weights, the second what training beyond the
    early-stopped weights cost on test images.

    Args:
        points: Models.
        x: Figure on the horizontal axis.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4 inches with those panels that a model can stand in, or None where there
        are none.
    """
    flatness = Quantity(x)
    gaps = (
        Quantity(_LOSS, minus=("train_eval/robust_loss", "final"), label="RLoss, test − train"),
        Quantity(_LOSS, minus=(_LOSS, "early_stopped"), label="test RLoss, last − early-stopped"),
    )
    panels = [(gap, spots) for gap in gaps if (spots := place(points, flatness, gap))]
    if not panels:
        return None
    figure, all_axes = make_canvas(6.8, 4.0, len(panels))
    for axes, (gap, spots) in zip(all_axes, panels):
        _draw_plane(axes, spots, published, flatness, gap)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    add_method_legend(figure)
    set_title(figure, title)
    return figure


def early_stopping_figure(
    points: Points, *, x: str = _FLATNESS, published: Points = (), title: str | None = None
) -> Figure | None:
    """Draws an arrow from each model's last weights to its early-stopped ones.

    Args:
        points: Models.
        x: Figure on the horizontal axis; RLoss is on the vertical.
        published: Models of the paper, at their last weights.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where no model was measured at both.
    """
    last = place(points, Quantity(x), Quantity(_LOSS))
    best = place(points, Quantity(x, "early_stopped"), Quantity(_LOSS, "early_stopped"))
    ends = [(a, b) for a in last for b in best if a.point is b.point]
    if not ends:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    last = [spot for spot, _ in ends]
    _draw_plane(axes, last, published, Quantity(x), Quantity(_LOSS))
    _draw_arrows(axes, ends)
    return _finish(figure, axes, last, title)


def _draw_arrows(axes: Axes, ends: Sequence[tuple[Spot, Spot]]) -> None:
    for last, best in ends:
        colour, marker = method_style(best.point.method)
        ring: dict[str, Any] = {"marker": marker, "facecolors": "white", "edgecolors": colour}
        axes.scatter([best.x], [best.y], s=22, linewidths=0.9, zorder=3, **ring)
        if (last.x, last.y) != (best.x, best.y):
            arrow: dict[str, Any] = {"arrowstyle": "->", "color": colour, "linewidth": 0.9}
            arrow |= {"shrinkA": 0, "shrinkB": 3, "mutation_scale": 8}
            axes.annotate("", (best.x, best.y), (last.x, last.y), arrowprops=arrow, zorder=3)
    look: dict[str, Any] = {"s": 22, "edgecolors": GREY, "linewidths": 0.9}
    axes.scatter([], [], facecolors=GREY, label="last weights", **look)
    axes.scatter([], [], facecolors="white", label="early-stopped weights", **look)


def _draw_plane(
    axes: Axes, spots: Sequence[Spot], published: Points, x: Quantity, y: Quantity
) -> None:
    draw_models(axes, spots)
    draw_grey(axes, place(published, x, y), PUBLISHED)
    set_axes(axes, x, y)


def _finish(figure: Figure, axes: Axes, spots: Sequence[Spot], title: str | None) -> Figure:
    """Names models where they stand, and methods in the legend where that leaves some without."""
    set_title(figure, title)
    add_method_legend(figure)
    unnamed = label_models(figure, axes, spots, [spot.point.label for spot in spots])
    add_method_legend(figure, {spot.point.method for spot in unnamed})
    return figure


def _correlation(points: Points, x: str, y: str, who: str = "") -> str | None:
    found = correlate(points, x, y) if points else None
    if found is None:
        return None
    pearson = _with_interval(found.pearson, found.pearson_interval)
    spearman = _with_interval(found.spearman, found.spearman_interval)
    return f"{who}Pearson {pearson}, Spearman {spearman}, {found.over}"


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.2f}" + (" [{:.2f}, {:.2f}]".format(*interval) if interval else "")
