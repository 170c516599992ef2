"""The two figures of one run: its trajectory, and its robust overfitting.

Both take the rows of `metrics.csv` or `results.json`, a mapping for each epoch. Missing metrics and
NaN are left out.

Example:
    >>> names = ("epoch", "flatness/average/test", "test/robust_loss")
    >>> rows = [dict(zip(names, (e, 0.2 + 0.1 * e, 1.5 + 0.2 * e))) for e in range(8)]
    >>> trajectory_figure(rows, title="AT").axes[0].get_ylabel()
    'test RLoss'
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from robust_flatness.plotting.canvas import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    add_bar,
    add_legend,
    make_canvas,
    sequential,
    set_title,
)
from robust_flatness.run_folder.metrics import LOSSES, Rows, logged_split, series

# Label, color, style and width of a line by its metric.
_Lines = Mapping[str, tuple[str, str, str, float]]
_LOSSES: _Lines = {
    "{}/robust_loss_incorrect": ("{}, incorrect", PURPLE, "-", 1.1),
    "{}/robust_loss": ("{}", ORANGE, "-", 1.8),
    "{}/robust_loss_correct": ("{}, correct", GREEN, "-", 1.1),
    "train/robust_loss": ("train", BLUE, "-", 1.8),
    "train_eval/robust_loss": ("train, weights fixed", BLUE, "--", 1.1),
}
_ERRORS: _Lines = {
    "val/robust_error": ("early-stopping images", "#BBBBBB", "-", 1.0),
    "test/robust_error": ("test", ORANGE, "-", 1.8),
    "train/robust_error": ("train", BLUE, "-", 1.8),
    "train_eval/robust_error": ("train, weights fixed", BLUE, "--", 1.1),
}


def trajectory_figure(
    rows: Rows, *, title: str | None = None, split: str = "test"
) -> Figure | None:
    """Draws robust loss against flatness, a point for each measured epoch (Fig. 5 of the paper).

    Args:
        rows: Rows with `epoch`, `flatness/average/<split>` and the split's robust loss. If they
            have `flatness/average/<split>_sem`, it is drawn as a faint bar of one standard error.
        title: A line above the figure.
        split: `test`, `val` or `train`.

    Returns:
        A figure of 5.2 x 3.6 inches, or None if no row has both metrics.
    """
    points = _points(rows, split)
    if not points:
        return None
    figure, (axes,) = make_canvas(5.2, 3.6, 1)
    _draw_trajectory(axes, points, split)
    set_title(figure, title)
    return figure


def plot_trajectory(run: Any, *, axes: Axes | None = None, split: str | None = None) -> Axes:
    """Plots robust loss against flatness, a point for each measured epoch (Fig. 5 of the paper).

    Args:
        run: The frame of `reporting.read_run`, or rows as of `metrics.csv`.
        axes: Where to draw; None makes a figure with pyplot.
        split: `test`, `val` or `train`; None takes the first that was measured.

    Returns:
        The axes.

    Raises:
        ValueError: If no epoch has both metrics.
    """
    rows = _rows(run)
    split = split or logged_split(rows) or "test"
    points = _points(rows, split)
    if not points:
        raise ValueError(
            f"Expected `run` to have flatness/average/{split} and {LOSSES[split]} in an epoch but "
            f"got {len(rows)} epochs without."
        )
    if axes is None:
        # Only here: pyplot keeps figures alive, and may need a display.
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
    _draw_trajectory(axes, points, split)
    return axes


def _draw_trajectory(
    axes: Axes, points: Sequence[tuple[float, float, float, float]], split: str
) -> None:
    epochs, flatness, losses, errors = zip(*points)
    grey: dict[str, Any] = {"fmt": "none", "ecolor": GREY, "elinewidth": 0.8, "alpha": 0.45}
    axes.errorbar(flatness, losses, xerr=errors, zorder=1, **grey)
    axes.plot(flatness, losses, color=GREY, linewidth=0.8, alpha=0.7, zorder=2)
    dot: dict[str, Any] = {"s": 34, "edgecolors": "white", "linewidths": 0.6}
    dots = axes.scatter(flatness, losses, c=epochs, cmap=sequential(), zorder=3, **dot)
    _mark_ends(axes, points)
    axes.margins(0.1, 0.12)
    axes.set_xlabel("average-case flatness in RLoss (lower is flatter)")
    axes.set_ylabel(f"{split} RLoss")
    figure: Any = axes.figure
    add_bar(figure, dots, axes, "epoch", pad=0.02, ticks=MaxNLocator(6, integer=True))


def overfitting_figure(
    rows: Rows,
    *,
    title: str | None = None,
    num_classes: int | None = None,
    best_epoch: int | None = None,
) -> Figure | None:
    """Draws robust loss and robust error throughout training (Fig. 2 of the paper).

    Left, RLoss on training and test images, and on test images that are correct or incorrect when
    clean; right, RErr. If nothing was measured on test images, those of `val` are drawn.

    Args:
        rows: Rows with `epoch` and any of `robust_loss` and `robust_error` of `train`,
            `train_eval`, `test` and `val`, `test/robust_loss_correct` and
            `test/robust_loss_incorrect`.
        title: A line above the figure.
        num_classes: Number K of classes, for a line at ln K, the loss of guessing.
        best_epoch: The early-stopped epoch, for a line in both panels.

    Returns:
        A figure of 6.8 x 3.3 inches, or None if there is nothing to draw.
    """
    figure, (left, right) = make_canvas(6.8, 3.3, 2)
    if not _draw_overfitting(left, right, rows, num_classes, best_epoch):
        return None
    add_legend(figure)
    set_title(figure, title)
    return figure


def plot_overfitting(
    run: Any, *, axes: Sequence[Axes] | None = None, num_classes: int | None = None
) -> tuple[Axes, Axes]:
    """Plots robust loss and robust error throughout training (Fig. 2 of the paper).

    Args:
        run: The frame of `reporting.read_run`, or rows as of `metrics.csv`.
        axes: Where to draw, one for RLoss and one for RErr; None makes a figure with pyplot.
        num_classes: Number K of classes, for a line at ln K, the loss of guessing.

    Returns:
        Both axes.

    Raises:
        ValueError: If there is nothing to draw.
    """
    rows, figure = _rows(run), None
    if axes is None:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(6.8, 3.3), layout="constrained")
    left, right = axes
    best_epoch = getattr(run, "attrs", {}).get("early_stopped_epoch")
    if not _draw_overfitting(left, right, rows, num_classes, best_epoch):
        raise ValueError(
            "Expected `run` to have robust_loss or robust_error of a split in an epoch but got "
            f"{len(rows)} epochs without."
        )
    if figure is None:
        left.legend(fontsize=FONT - 1, frameon=False)
    else:
        add_legend(figure)
    return left, right


def _rows(run: Any) -> Rows:
    """The rows of a pandas frame, or of what has rows already."""
    rows: Rows = run.to_dict("records") if hasattr(run, "to_dict") else run
    return rows


def _draw_overfitting(
    left: Axes, right: Axes, rows: Rows, num_classes: int | None, best_epoch: int | None
) -> bool:
    drawn = [_draw_lines(left, rows, _LOSSES), _draw_lines(right, rows, _ERRORS)]
    if not any(drawn):
        return False
    if num_classes is not None:
        label = f"guessing (ln {num_classes})"
        left.axhline(math.log(num_classes), color=GREY, linestyle=":", linewidth=1.1, label=label)
    if best_epoch is not None:
        _draw_early_stopping(left, right, rows, best_epoch)
    left.set_ylabel("RLoss")
    right.set_ylabel("RErr")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return True


def _draw_lines(axes: Axes, rows: Rows, lines: _Lines) -> bool:
    split = "test" if series(rows, "test/robust_loss") else "val"
    for name, (label, color, style, width) in lines.items():
        points = series(rows, name.format(split))
        if points:
            look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": width}
            # A single epoch is not a line, and a few are easier to read with markers.
            look |= {"marker": "o", "markersize": 2.5} if len(points) <= 20 else {}
            axes.plot(*zip(*points), label=label.format(split), **look)
    return bool(axes.lines)


def _draw_early_stopping(left: Axes, right: Axes, rows: Rows, best_epoch: int) -> None:
    line: dict[str, Any] = {"color": "black", "linestyle": "-.", "linewidth": 0.8}
    for axes in (left, right):
        axes.axvline(best_epoch, label="early stopping", **line)
    error = dict(series(rows, "test/robust_error")).get(best_epoch)
    if error is not None:
        right.axhline(error, **line)


def _mark_ends(axes: Axes, points: Sequence[tuple[float, ...]]) -> None:
    for epoch, x, y, _ in (points[0], points[-1])[: len(points)]:
        axes.plot(x, y, "o", markersize=10, fillstyle="none", color="black", zorder=4)
        where: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"epoch {epoch:g}", (x, y), fontsize=FONT - 1, **where)


def _points(rows: Rows, split: str) -> list[tuple[float, float, float, float]]:
    losses = dict(series(rows, LOSSES[split]))
    errors = dict(series(rows, f"flatness/average/{split}_sem"))
    flatness = series(rows, f"flatness/average/{split}")
    return [(e, x, losses[e], errors.get(e, 0.0)) for e, x in flatness if e in losses]
