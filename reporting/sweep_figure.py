"""How far one setting moves a method in the plane of flatness and robust loss (Fig. 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from robust_flatness.plotting.canvas import FONT, GREY, make_canvas, method_style, set_title
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
from robust_flatness.reporting.sweeps import find_sweeps

_FEW = 20  # models that can all be labelled


def hyperparameter_figure(
    points: Sequence[Point],
    x: str = "flatness/average/test",
    y: str = "test/robust_loss",
    *,
    published: Sequence[Point] = (),
    title: str | None = None,
) -> Figure | None:
    """Draws sweeps, with a line through each (Fig. 6).

    Shades go from light to dark with the value of the setting that was varied.

    Args:
        points: Models, of which those are drawn that `find_sweeps` puts into a sweep.
        x: Figure on the horizontal axis.
        y: Figure on the vertical axis.
        published: Models of the paper.
        title: A line above the figure.

    Returns:
        A figure of 6.8 x 4.6 inches, or None where there is no sweep with both figures.
    """
    quantities = (Quantity(x), Quantity(y))
    placed = {id(spot.point): spot for spot in place(points, *quantities)}
    found = find_sweeps([point for point in points if id(point) in placed])
    if not found:
        return None
    sweeps = [[(placed[id(step.point)], step.setting) for step in sweep] for sweep in found]
    figure, (axes,) = make_canvas(6.8, 4.6)
    for sweep in sweeps:
        _draw_sweep(axes, [spot for spot, _ in sweep])
    draw_grey(axes, place(published, *quantities), PUBLISHED)
    set_axes(axes, *quantities)
    note = "light to dark: from the lowest to the highest value; dotted: least squares"
    axes.set_title(note, loc="left", fontsize=FONT - 1, color=GREY)
    set_title(figure, title)
    add_method_legend(figure)
    _label_settings(figure, axes, sweeps)
    return figure


def _draw_sweep(axes: Axes, spots: Sequence[Spot]) -> None:
    colour = method_style(spots[0].point.method).colour
    draw_trend(axes, spots, at_least=2, color=colour)
    shades = [_lighter(colour, share) for share in np.linspace(0.7, 0, len(spots))]
    look: dict[str, Any] = {"color": None, "facecolors": shades, "edgecolors": colour}
    draw_models(axes, spots, **look, linewidths=0.8)


def _label_settings(
    figure: Figure, axes: Axes, sweeps: Sequence[Sequence[tuple[Spot, str]]]
) -> None:
    """Writes settings beside models, where these are many beside the two ends of a sweep alone."""
    everything = [step for sweep in sweeps for step in sweep]
    ends = [step for sweep in sweeps for step in (sweep[0], sweep[-1])]
    named = everything if len(everything) <= _FEW else ends
    others = [spot for spot, setting in everything if (spot, setting) not in named]
    spots, settings = [spot for spot, _ in named], [setting for _, setting in named]
    label_models(figure, axes, spots, settings, others)


def _lighter(colour: str, share: float) -> str:
    """Mixes a colour with so much white."""
    red, green, blue = (share + (1 - share) * part for part in to_rgb(colour))
    return to_hex((red, green, blue))
