"""Landscapes of several methods beside their RErr (Fig. 4), and the measure itself (Fig. 3)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from robust_flatness.plotting.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREY,
    ORANGE,
    MethodStyle,
    make_canvas,
    method_styles,
    set_title,
)
from robust_flatness.plotting.landscape_figures import NAMES, drawn_line, set_loss_axes
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.panel_figures import ADAM, BATCH_SIZE, select_models
from robust_flatness.run_folder.files import Array, Landscape
from robust_flatness.run_folder.metrics import METHOD_LABELS, method_label
from robust_flatness.run_folder.runs import Run

MOST_LINES = 12
_KINDS = ("random", "adversarial")
# In the order of the paper's two rows of panels.
_FIRST = (
    "at",
    "label_smoothing",
    "mart",
    "entropy_sgd",
    "self_supervision",
    "trades",
    "at_awp",
    "mish",
    BATCH_SIZE,
    ADAM,
    "at_scaled_half",
    "at_scaled_double",
)
_ERRORS = {"PGD": "test/robust_error", "AutoAttack": "test/autoattack_error"}
_STROKES: Mapping[str, Any] = {
    "o": "-",
    "s": "--",
    "^": "-.",
    "D": (0, (4, 1, 1, 1, 1, 1)),
    "v": ":",
}


class _Row(NamedTuple):
    label: str
    landscapes: Mapping[str, Landscape]
    look: dict[str, Any]


def landscapes_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws RLoss along random and adversarial directions, with RErr beside it (Fig. 4).

    A line is the mean over random directions, or the highest adversarial one, of the last weights
    of the first seed that has a landscape. Losses are on a logarithmic axis cut at 15. The models
    of the paper's figure come first, 12 at most. Errors are means over seeds; a dash is what was
    not measured.

    Returns a figure of 6.8 inches in width, or None if no model has a landscape.
    """
    rows = _rows(models)
    kinds = [kind for kind in _KINDS if any(kind in row.landscapes for row in rows)]
    if not kinds:
        return None
    figure, all_axes = make_canvas(6.8, 3.4, len(kinds) + 1)
    *panels, table = all_axes
    cast(GridSpec, table.get_gridspec()).set_width_ratios([4.2 / len(kinds)] * len(kinds) + [2.6])
    drawn = [_draw_panel(axes, kind, rows) for axes, kind in zip(panels, kinds)]
    set_loss_axes(panels, [line for lines in drawn for line in lines])
    panels[0].set_ylabel("RLoss")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    _draw_table(table, models, rows)
    set_title(figure, title)
    return figure


def schematic_figure(run: Run) -> Figure | None:
    """Draws the measure: how far RLoss rises from the weights w to w + ν (Fig. 3).

    One random direction ν is drawn in full, the others pale. The arrow is the loss at w + ν minus
    that at w, both attacked anew; its mean over directions is average-case flatness at the ξ of the
    landscape.

    Returns a figure of 5.2 x 3.2 inches, or None if the run has no landscape of its last weights
    along random directions that reaches from -ν to ν.
    """
    measure = typical_direction(run)
    if measure is None:
        return None
    steps, curves, typical, (left, low, high), flatness = measure
    figure, (axes,) = make_canvas(5.2, 3.2)
    axes.plot(steps, np.delete(curves, typical, axis=0).T, color=GREY, linewidth=0.6, alpha=0.5)
    axes.plot(steps, curves[typical], color=BLUE, linewidth=1.8)
    axes.plot([0.0], [low], "o", color=BLACK, markersize=7, zorder=4)
    axes.plot([-1.0, 1.0], [left, high], "o", color=BLUE, markersize=7, zorder=4)
    style: dict[str, Any] = {"fontsize": FONT, "textcoords": "offset points"}
    axes.annotate("w", (0.0, low), xytext=(0, -14), ha="center", **style)
    axes.annotate("w − ν", (-1.0, left), xytext=(-8, 0), ha="right", va="center", **style)
    axes.annotate("w + ν", (1.0, high), xytext=(8, 0), ha="left", va="center", **style)
    axes.plot([0.0, 1.08], [low, low], color=BLACK, linewidth=0.7, linestyle=":")
    arrow: dict[str, Any] = {"arrowstyle": "<->", "color": ORANGE, "linewidth": 1.4}
    axes.annotate("", (1.0, low), xytext=(1.0, high), arrowprops=arrow)
    text = (
        f"RLoss(w + ν) − RLoss(w) = {high - low:.2f}\n"
        f"mean over {len(curves)} directions ν = {flatness:.2f},\nthe average-case flatness"
    )
    # Above the valley, in the free space between the branches.
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": FONT - 1, "color": ORANGE}
    axes.text(0.0, low + 0.75 * (high - low), text, **look)
    axes.set_xlabel("step s along a random direction ν, ‖ν‖ = ξ‖w‖ in each layer")
    axes.set_ylabel("RLoss at w + s · ν")
    axes.set_xticks([-1.0, 0.0, 1.0])
    axes.set_xlim(-1.3, 1.3)
    axes.margins(y=0.14)
    set_title(figure, f"{method_label(run.method)} on {run.data}")
    return figure


def typical_direction(
    run: Run,
) -> tuple[Array, Array, int, tuple[float, float, float], float] | None:
    """The landscape along random directions and what flatness measures in it.

    Returns:
        Steps `(S,)`; losses `(D, S)`; the index of the direction with the median rise; its losses
        at w − ν, w and w + ν; and the mean rise over directions. None without such a landscape.
    """
    landscape = run.landscapes.get("final/random")
    if landscape is None or not np.isfinite(landscape.losses).all():
        return None
    steps, curves = landscape.coordinates, landscape.curves
    if len(steps) < 2 or steps[0] > -1 + 1e-9 or steps[-1] < 1 - 1e-9:
        return None
    before, here, beyond = (
        np.array([np.interp(step, steps, curve) for curve in curves]) for step in (-1.0, 0.0, 1.0)
    )
    typical = int(np.argsort(beyond)[len(beyond) // 2])
    losses = (float(before[typical]), float(here[typical]), float(beyond[typical]))
    return steps, curves, typical, losses, float((beyond - here).mean())


def _rows(models: Models) -> list[_Row]:
    measured = {label: _landscapes(models.runs[label]) for label in models.labels}
    able = [label for label in models.labels if measured[label]]
    shown = select_models(models, able, _FIRST, MOST_LINES)
    styles = method_styles(models.methods, METHOD_LABELS)
    own = {models.frame.at[label, "method"] for label in shown}
    spare = [style for method, style in styles.items() if method not in own]
    rows: list[_Row] = []
    taken: set[MethodStyle] = set()
    for label in shown:
        # The second model of a method takes a look that no other has.
        style = styles[models.frame.at[label, "method"]]
        style = spare.pop(0) if style in taken else style
        taken.add(style)
        look = {"color": style.colour, "marker": style.marker, "linestyle": _STROKES[style.marker]}
        rows.append(_Row(label, measured[label], look | {"linewidth": 1.2, "markersize": 3.5}))
    return rows


def _landscapes(runs: Sequence[Run]) -> Mapping[str, Landscape]:
    """Those of the first seed that has any."""
    for run in runs:
        own = {
            kind: run.landscapes[f"final/{kind}"]
            for kind in _KINDS
            if f"final/{kind}" in run.landscapes
        }
        if any(np.isfinite(drawn_line(kind, landscape)).any() for kind, landscape in own.items()):
            return own
    return {}


def _draw_panel(axes: Axes, kind: str, rows: Sequence[_Row]) -> list[Array]:
    lines = []
    for place, row in enumerate(rows):
        if kind in row.landscapes:
            line = drawn_line(kind, row.landscapes[kind])
            # Markers of different lines stand at different steps.
            every = (place % 3, max(1, len(line) // 5))
            steps = row.landscapes[kind].coordinates
            axes.plot(steps, line, markevery=every, label=row.label, **row.look)
            lines.append(line)
    axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    axes.set_xlabel(f"step s along {NAMES[kind]}", fontsize=FONT - 1.5)
    axes.margins(x=0)
    return lines


def _draw_table(axes: Axes, models: Models, rows: Sequence[_Row]) -> None:
    """A legend with the test RErr by each attack."""
    errors = {attack: models.column(name)["mean"] for attack, name in _ERRORS.items()}
    attacks = [a for a, means in errors.items() if any(row.label in means for row in rows)]
    columns = dict(zip(reversed(attacks), (1.0, 0.7)))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(rows), 8) + 0.5, -1.6)
    text: dict[str, Any] = {"fontsize": FONT - 1.5, "va": "center"}
    if columns:
        axes.text(1.0, -1.2, "test RErr in %", ha="right", **text)
    for attack, x in columns.items():
        axes.text(x, -0.5, attack, ha="right", **text)
    for place, row in enumerate(rows):
        y = place + 0.5
        axes.plot([0.0, 0.05, 0.1], [y] * 3, markevery=[1], **row.look)
        axes.text(0.13, y, textwrap.fill(row.label, 22), linespacing=0.9, **text)
        for attack, x in columns.items():
            error = errors[attack].get(row.label)
            axes.text(x, y, "–" if error is None else f"{100 * error:.1f}", ha="right", **text)
