"""Landscapes of several methods with the table of their RErr beside them (Fig. 4 of the paper)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from robust_flatness.plotting.canvas import (
    FONT,
    GREY,
    MethodStyle,
    make_canvas,
    method_style,
    set_title,
)
from robust_flatness.plotting.landscape_figures import NAMES, drawn_line, set_loss_axes
from robust_flatness.plotting.method_labels import METHOD_LABELS
from robust_flatness.reporting.models import Model
from robust_flatness.reporting.series import ADAM, BATCH_SIZE, select_models
from robust_flatness.run_folder.landscape_file import Array, Landscape

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
# With colour and marker as everywhere else; lines of equal colour need not have equal strokes.
_STROKES: Mapping[str, Any] = {
    "o": "-",
    "s": "--",
    "^": "-.",
    "D": (0, (4, 1, 1, 1, 1, 1)),
    "v": ":",
}


class _Row(NamedTuple):
    """A model with the landscapes of its first seed that has some."""

    model: Model
    landscapes: Mapping[str, Landscape]
    style: MethodStyle


def landscapes_figure(models: list[Model], *, title: str | None = None) -> Figure | None:
    """Draws RLoss along random and adversarial directions, with RErr beside it (Fig. 4).

    A line is the mean over random directions, or the highest adversarial one, of the last weights
    of the first seed whose landscape was measured. Losses are on a logarithmic axis cut at 15.

    Args:
        models: Of which those of the paper's figure come first, 12 at most: also other batch sizes
            than the most common, Adam, and networks that were scaled (`at_scaled_…`).
        title: A line above the figure.

    Returns:
        A figure of 6.8 inches in width, or None where no model has a landscape. The table's errors
        are means over seeds; a dash is what was not measured.
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
    _draw_table(table, rows)
    set_title(figure, title)
    return figure


def _rows(models: Sequence[Model]) -> list[_Row]:
    found = {model.label: _landscapes(model) for model in models}
    able = [model for model in models if found[model.label]]
    chosen = select_models(able, _FIRST, MOST_LINES)
    return [_Row(m, found[m.label], style) for m, style in zip(chosen, _styles(chosen))]


def _landscapes(model: Model) -> Mapping[str, Landscape]:
    """Those to draw of the first seed that has any."""
    for run in model.runs:
        measured = run.landscapes()
        found = {kind: measured[f"final/{kind}"] for kind in _KINDS if f"final/{kind}" in measured}
        if any(np.isfinite(drawn_line(kind, land)).any() for kind, land in found.items()):
            return found
    return {}


def _styles(models: Sequence[Model]) -> list[MethodStyle]:
    """Each method's own, and for its second model the next that no other has."""
    taken = {method_style(model.method) for model in models}
    spare = [style for method in METHOD_LABELS if (style := method_style(method)) not in taken]
    styles: list[MethodStyle] = []
    for model in models:
        style = method_style(model.method)
        styles.append(spare.pop(0) if style in styles else style)
    return styles


def _draw_panel(axes: Axes, kind: str, rows: Sequence[_Row]) -> list[Array]:
    lines = []
    for place, row in enumerate(rows):
        if kind in row.landscapes:
            landscape = row.landscapes[kind]
            line = drawn_line(kind, landscape)
            look = _look(row.style)
            # Markers of different lines stand at different steps.
            every = (place % 3, max(1, len(line) // 5))
            axes.plot(landscape.coordinates, line, markevery=every, label=row.model.label, **look)
            lines.append(line)
    axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    axes.set_xlabel(f"step s along {NAMES[kind]}", fontsize=FONT - 1.5)
    axes.margins(x=0)
    return lines


def _draw_table(axes: Axes, rows: Sequence[_Row]) -> None:
    """A legend with errors: a stroke, the model's name, and its test RErr by each attack."""
    measured = {attack: [row.model.mean(name) for row in rows] for attack, name in _ERRORS.items()}
    attacks = [name for name, errors in measured.items() if any(e is not None for e in errors)]
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
        axes.plot([0.0, 0.05, 0.1], [y] * 3, markevery=[1], **_look(row.style))
        axes.text(0.13, y, textwrap.fill(row.model.label, 22), linespacing=0.9, **text)
        for attack, x in columns.items():
            axes.text(x, y, _percent(measured[attack][place]), ha="right", **text)


def _look(style: MethodStyle) -> dict[str, Any]:
    return {
        "color": style.colour,
        "marker": style.marker,
        "linestyle": _STROKES[style.marker],
        "linewidth": 1.2,
        "markersize": 3.5,
    }


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.1f}"
