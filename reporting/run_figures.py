"""Robust overfitting of many models side by side (Fig. 2), and all measures of one of them."""

import math
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)

from robust_flatness.plotting.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    add_legend,
    make_canvas,
    set_title,
)
from robust_flatness.reporting.models import Model
from robust_flatness.reporting.multiples import Ruler, share_axes, small_multiples
from robust_flatness.reporting.runs import Run
from robust_flatness.reporting.series import (
    draw_series,
    model_series,
    select_models,
)

Lines = tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...]

MOST_PANELS = 20
# Losses on incorrect and on training examples are hundreds of times apart.
_LOWEST_LOSS, _HIGHEST_LOSS = 0.03, 15.0

_TEST: dict[str, Any] = {"colour": ORANGE, "linewidth": 1.4}
_TRAIN: dict[str, Any] = {"colour": BLUE, "linewidth": 1.4, "linestyle": (0, (1, 1))}
_INCORRECT: dict[str, Any] = {"colour": PURPLE, "linewidth": 0.7}
_CORRECT: dict[str, Any] = {"colour": GREEN, "linewidth": 0.7}
_AVERAGE: dict[str, Any] = {"colour": GREEN, "linewidth": 1.4, "linestyle": "--"}
_WORST: dict[str, Any] = {"colour": PURPLE, "linewidth": 1.4, "linestyle": "-."}
_CURVATURE: dict[str, Any] = {"colour": BLACK, "linewidth": 0.9}
_STOPPING: dict[str, Any] = {"color": BLACK, "linewidth": 0.5, "linestyle": "-."}

# `train_eval` has fixed weights, the attack of `test` and no augmentation; `train` is what there is
# without it.
_TRAIN_LOSS = ("train_eval/robust_loss", "train/robust_loss")
_TRAIN_ERROR = ("train_eval/robust_error", "train/robust_error")
_LOSSES: Lines = (
    ("test, incorrect when clean", ("test/robust_loss_incorrect",), _INCORRECT),
    ("test", ("test/robust_loss",), _TEST),
    ("test, correct when clean", ("test/robust_loss_correct",), _CORRECT),
    ("train", _TRAIN_LOSS, _TRAIN),
)
_ERRORS: Lines = (("test", ("test/robust_error",), _TEST), ("train", _TRAIN_ERROR, _TRAIN))
_MEASURES: Lines = (
    ("train RLoss", _TRAIN_LOSS, _TRAIN),
    ("test RLoss", ("test/robust_loss",), _TEST),
    ("average-case flatness", ("flatness/average/test",), _AVERAGE),
    ("worst-case flatness", ("flatness/worst/test",), _WORST),
)


def curves_figure(models: list[Model], *, title: str | None = None) -> Figure | None:
    """Draws train and test RLoss and RErr throughout training, two panels a model (Fig. 2).

    Lines are means over seeds, bands reach from the lowest seed to the highest. All models share
    their axes, and that of losses is logarithmic and cut at 0.03 and 15.

    Args:
        models: Of which the first of each method come first, 20 at most.
        title: A line above the figure.

    Returns:
        A figure of 6.8 inches in width, or None where no model has test RLoss or RErr.
    """
    able = [model for model in models if model_series(model, "test/robust_loss", *_ERRORS[0][1])]
    shown = select_models(able, ["at"], MOST_PANELS)
    if not shown:
        return None
    labels = [model.label for model in shown]
    figure, panels = small_multiples(labels, heights=(1.15, 0.8))
    for model, (losses, errors) in zip(shown, panels):
        _draw(losses, model, _LOSSES)
        _draw(errors, model, _ERRORS)
        _draw_guessing(losses, model)
        _draw_early_stopping(losses, errors, model)
        losses.set(xlim=(0, 1), yscale="log")
        low, high = losses.get_ylim()
        losses.set_ylim(max(low, _LOWEST_LOSS), min(high, _HIGHEST_LOSS))
        errors.set(xlim=(0, 1), ylim=(0, errors.get_ylim()[1]))
    share_axes(
        panels,
        Ruler("share of training", set_percents),
        Ruler("RLoss", _set_loss_axis),
        Ruler("RErr", _set_error_axis),
    )
    add_legend(figure, columns=3)
    set_title(figure, title)
    return figure


def epochs_figure(model: Model) -> Figure | None:
    """Draws RLoss, flatness and curvature of one model throughout training (long version).

    λ_max is divided by the power of ten that brings it among the others. Dotted lines are drops of
    the learning rate.

    Args:
        model: Of whose figures those are drawn that its trajectory has.

    Returns:
        A figure of 5.2 x 3.4 inches, or None where neither flatness nor curvature was measured
        throughout training.
    """
    measured = {
        label: (series, look)
        for label, names, look in _MEASURES
        if (series := model_series(model, *names)) is not None
    }
    eigenvalues = model_series(model, "hessian/max_eigenvalue")
    if not eigenvalues and set(measured) <= {"train RLoss", "test RLoss"}:
        return None
    if eigenvalues:
        highest = max((max(series.high) for series, _ in measured.values()), default=math.inf)
        unit = _unit(max(eigenvalues.high), highest)
        label = f"λ_max / {unit:g}" if unit > 1 else "λ_max"
        measured[label] = (eigenvalues.divided(unit), _CURVATURE)
    figure, (axes,) = make_canvas(5.2, 3.4)
    for label, (series, look) in measured.items():
        draw_series(axes, series, label=label, **look)
    for share in rate_drops(model.runs[0]):
        axes.axvline(share, color=GREY, linewidth=1.0, linestyle=":", label="learning rate drops")
    axes.set_xlim(0, 1)
    if min(min(series.low) for series, _ in measured.values()) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("share of training")
    axes.set_ylabel("RLoss, and flatness in RLoss")
    set_percents(axes.xaxis, step=0.2)
    add_legend(figure, columns=3)
    set_title(figure, model.label)
    return figure


def rate_drops(run: Run) -> list[float]:
    """Shares of training at which the learning rate falls to a half or less in one step.

    Args:
        run: With `train/learning_rate` in its trajectory.

    Returns:
        None of a rate that changes all the time, such as a cyclic one's.
    """
    rows = [row for row in run.trajectory if "train/learning_rate" in row]
    rates = [row["train/learning_rate"] for row in rows]
    return [
        rows[i]["epoch"] / run.epochs
        for i in range(2, len(rows) - 1)
        if rates[i - 2] == rates[i - 1] >= 2 * rates[i] == 2 * rates[i + 1]
    ]


def set_percents(axis: Axis, step: float = 0.5) -> None:
    """Ticks of a share of training, by default few enough for a small panel."""
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _unit(eigenvalue: float, highest: float) -> float:
    """The power of ten that an eigenvalue is shown in."""
    if eigenvalue <= highest or highest <= 0:
        return 1.0
    return 10.0 ** math.ceil(math.log10(eigenvalue / highest))


def _draw(axes: Axes, model: Model, lines: Lines) -> None:
    for label, names, look in lines:
        series = model_series(model, *names)
        if series:
            draw_series(axes, series, label=label, **look)


def _draw_guessing(axes: Axes, model: Model) -> None:
    number = model.runs[0].num_classes
    if number:
        label = f"guessing (ln {number})"
        axes.axhline(math.log(number), color=GREY, linestyle=":", linewidth=0.9, label=label)


def _draw_early_stopping(losses: Axes, errors: Axes, model: Model) -> None:
    """A vertical line for each seed, and their mean error then as a horizontal one."""
    found = []
    for run in model.runs:
        if run.early_stopped_epoch is None:
            continue
        for axes in (losses, errors):
            share = (run.early_stopped_epoch + 1) / run.epochs
            axes.axvline(share, label="early stopping", **_STOPPING)
        found += [
            row["test/robust_error"]
            for row in run.trajectory
            if row["epoch"] == run.early_stopped_epoch and "test/robust_error" in row
        ]
    if found:
        errors.axhline(fmean(found), **_STOPPING)


def _set_loss_axis(axis: Axis) -> None:
    axis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _set_error_axis(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
