"""How far one setting moves a method in the plane of flatness and robust loss (Fig. 6)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from robust_flatness.reporting.canvas import FONT, GREY, make_canvas, method_style, set_title
from robust_flatness.reporting.labels import label_models
from robust_flatness.reporting.models import Point, method_label
from robust_flatness.reporting.scatter import (
    PUBLISHED,
    Quantity,
    Spot,
    add_method_legend,
    by_method,
    draw_grey,
    draw_models,
    draw_trend,
    place,
    set_axes,
)

_FEW = 20  # models that can all be labelled
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def hyperparameter_figure(
    points: Sequence[Point],
    x: str = "flatness/average/test",
    y: str = "test/robust_loss",
    *,
    published: Sequence[Point] = (),
    title: str | None = None,
) -> Figure | None:
    """Draws methods that have several models, with a line through each method's (Fig. 6).

    Shades go from light to dark with the value of the setting that tells the models apart.

    Args:
        points: Models.
        x: Figure on the horizontal axis.
        y: Figure on the vertical axis.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where no method has two models with both figures.
    """
    quantities = (Quantity(x), Quantity(y))
    groups = by_method(place(points, *quantities))
    sweeps = {method: _in_order(spots) for method, spots in groups.items() if len(spots) > 1}
    if not sweeps:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    for spots in sweeps.values():
        _draw_sweep(axes, spots)
    draw_grey(axes, [groups[m][0] for m in groups if m not in sweeps], "other methods")
    draw_grey(axes, place(published, *quantities), PUBLISHED)
    set_axes(axes, *quantities)
    note = "light to dark: from the lowest to the highest value; dotted: least squares"
    axes.set_title(note, loc="left", fontsize=FONT - 1, color=GREY)
    set_title(figure, title)
    add_method_legend(figure)
    _label_settings(figure, axes, list(sweeps.values()))
    return figure


def _draw_sweep(axes: Axes, spots: Sequence[Spot]) -> None:
    colour = method_style(spots[0].point.method).colour
    draw_trend(axes, spots, at_least=2, color=colour)
    shades = [_lighter(colour, share) for share in np.linspace(0.7, 0, len(spots))]
    look: dict[str, Any] = {"color": None, "facecolors": shades, "edgecolors": colour}
    draw_models(axes, spots, **look, linewidths=0.8)


def _label_settings(figure: Figure, axes: Axes, sweeps: Sequence[Sequence[Spot]]) -> None:
    """Writes settings beside models, where these are many beside the two ends of a sweep alone."""
    spots = [spot for sweep in sweeps for spot in sweep]
    ends = [spot for sweep in sweeps for spot in (sweep[0], sweep[-1])]
    named = spots if len(spots) <= _FEW else ends
    others = [spot for spot in spots if spot not in named]
    label_models(figure, axes, named, [_setting(spot.point) for spot in named], others)


def _in_order(spots: Sequence[Spot]) -> list[Spot]:
    """Sorts models of a method by the numbers in their labels, those without first."""
    return sorted(spots, key=lambda spot: [float(n) for n in _NUMBER.findall(_setting(spot.point))])


def _setting(point: Point) -> str:
    """What a label says beyond its method."""
    return point.label.removeprefix(method_label(point.method)).strip(" ()") or point.label


def _lighter(colour: str, share: float) -> str:
    """Mixes a colour with so much white."""
    red, green, blue = (share + (1 - share) * part for part in to_rgb(colour))
    return to_hex((red, green, blue))
