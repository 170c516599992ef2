"""Training over epochs: a panel for each model (Figs. 2 and 5), and all measures of one model."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
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
from robust_flatness.reporting.frame import Models, flat_settings
from robust_flatness.reporting.scatter_figures import PUBLISHED
from robust_flatness.run_folder.metrics import METHOD_LABELS
from robust_flatness.run_folder.runs import Run

ADAM, BATCH_SIZE = "Adam", "another batch size"
MOST_PANELS = 20
_COLUMNS = 5
_SMALL = FONT - 2  # points, of labels in panels a fifth of the page wide
# Losses on incorrect and on training examples differ by factors of hundreds.
_LOWEST_LOSS, _HIGHEST_LOSS = 0.03, 15.0
# Flatness and RLoss of the first epochs may be far from all others.
_WARM_UP = 0.05
_FLATNESS, _LOSS = "flatness/average/test", "test/robust_loss"


class Line(NamedTuple):
    """A line of a panel: label, look, and metrics, of which the first measured one is drawn."""

    label: str
    names: tuple[str, ...]
    look: dict[str, Any]


def _look(color: str, width: float = 1.4, style: Any = "-") -> dict[str, Any]:
    return {"color": color, "linewidth": width, "linestyle": style}


_TEST, _TRAIN = _look(ORANGE), _look(BLUE, style=(0, (1, 1)))
_STOPPING = _look(BLACK, 0.5, "-.")
# `train_eval` has fixed weights and the attack of `test`; `train` stands in if it was not measured.
_TRAIN_LOSS = ("train_eval/robust_loss", "train/robust_loss")
_LOSSES = (
    Line("test, incorrect when clean", ("test/robust_loss_incorrect",), _look(PURPLE, 0.7)),
    Line("test", (_LOSS,), _TEST),
    Line("test, correct when clean", ("test/robust_loss_correct",), _look(GREEN, 0.7)),
    Line("train", _TRAIN_LOSS, _TRAIN),
)
_ERRORS = (
    Line("test", ("test/robust_error",), _TEST),
    Line("train", ("train_eval/robust_error", "train/robust_error"), _TRAIN),
)
_MEASURES = (
    Line("RLoss, train", _TRAIN_LOSS, _TRAIN),
    Line("RLoss, test", (_LOSS,), _TEST),
    Line("average-case flatness, test", (_FLATNESS,), _look(GREEN, style="--")),
    Line("worst-case flatness, test", ("flatness/worst/test",), _look(PURPLE, style="-.")),
)


def curves_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws train and test RLoss and RErr during training, two panels for each model (Fig. 2).

    Lines are means over seeds, bands reach from the lowest seed to the highest. All models share
    their axes; that of losses is logarithmic and cut at 0.03 and 15.

    Returns a figure of 6.8 inches in width, or None if no model has test RLoss or RErr.
    """
    series = {label: models.series(label, _LOSS, "test/robust_error") for label in models.labels}
    able = [label for label, one in series.items() if one is not None]
    shown = select_models(models, able, ["at"], MOST_PANELS)
    if not shown:
        return None
    figure, panels = small_multiples(shown, heights=(1.15, 0.8))
    for label, (losses, errors) in zip(shown, panels):
        _draw_lines(losses, models, label, _LOSSES)
        _draw_lines(errors, models, label, _ERRORS)
        if number := models.runs[label][0].num_classes:
            losses.axhline(math.log(number), label=f"guessing (ln {number})", **_GUESSING)
        _draw_early_stopping(losses, errors, models.runs[label])
        losses.set(xlim=(0, 1), yscale="log")
        low, high = losses.get_ylim()
        losses.set_ylim(max(low, _LOWEST_LOSS), min(high, _HIGHEST_LOSS))
        errors.set(xlim=(0, 1), ylim=(0, errors.get_ylim()[1]))
    rulers = (Ruler("RLoss", _set_loss_axis), Ruler("RErr", _set_error_axis))
    share_axes(panels, Ruler("share of training", _set_percents), *rulers)
    add_legend(figure, columns=3)
    set_title(figure, title)
    return figure


def trajectories_figure(
    models: Models, published: pd.DataFrame | None = None, *, title: str | None = None
) -> Figure | None:
    """Draws test RLoss against flatness during training, a panel for each model (Fig. 5).

    Points are means over seeds at the epochs that all seeds measured, coloured by the share of
    training; a ring marks the last. All panels share their axes, which may leave points of the
    first twentieth of training outside. Trajectories of the paper are pale, behind models of their
    method: of other data, and possibly the highest of ten directions instead of the mean.

    Returns a figure of 6.8 inches in width, or None if no model measured both during training.
    """
    paths = {label: path for label in models.labels if len(path := trajectory(models, label))}
    shown = select_models(models, list(paths), _TRAJECTORIES_FIRST, MOST_PANELS)
    if not shown:
        return None
    figure, panels = small_multiples(shown, heights=(1.35,))
    for label, (axes,) in zip(shown, panels):
        theirs = published_path(published, models.frame.at[label, "method"])
        if len(theirs):
            look: dict[str, Any] = {"markersize": 2.2, "linewidth": 0.6, "zorder": 1}
            axes.plot(theirs["x"], theirs["y"], "o-", color="#C4C4C4", label=PUBLISHED, **look)
        dots = _draw_trajectory(axes, paths[label])
        kept = paths[label][paths[label]["share"] > _WARM_UP]
        kept = kept if len(kept) else paths[label]
        kept = pd.concat([kept, theirs]) if len(theirs) else kept
        for set_limits, values in ((axes.set_xlim, kept["x"]), (axes.set_ylim, kept["y"])):
            margin = 0.08 * (values.max() - values.min()) or 0.1
            set_limits(min(0.0, values.min()) - margin, values.max() + margin)
    share_axes(panels, Ruler("average-case flatness", _set_few), Ruler("RLoss, test", _set_few))
    _add_bar(figure, dots)
    add_legend(figure)
    set_title(figure, title)
    return figure


def epochs_figure(models: Models, label: str) -> Figure | None:
    """Draws RLoss, flatness and curvature of one model during training (long version).

    λ_max is divided by the power of ten that brings it among the others. Dotted lines are drops of
    the learning rate.

    Returns a figure of 5.2 x 3.4 inches, or None if neither flatness nor curvature was measured
    during training.
    """
    measured = {
        line.label: (series, line.look)
        for line in _MEASURES
        if (series := models.series(label, *line.names)) is not None
    }
    eigenvalues = models.series(label, "hessian/max_eigenvalue")
    if eigenvalues is None and set(measured) <= {"RLoss, train", "RLoss, test"}:
        return None
    if eigenvalues is not None:
        highest = max((series["high"].max() for series, _ in measured.values()), default=math.inf)
        unit = _unit(eigenvalues["high"].max(), highest)
        scaled = eigenvalues.assign(**{n: eigenvalues[n] / unit for n in ("mean", "low", "high")})
        name = f"λ_max / {unit:g}" if unit > 1 else "λ_max"
        measured[name] = (scaled, {"color": BLACK, "linewidth": 0.9})
    figure, (axes,) = make_canvas(5.2, 3.4)
    for name, (series, look) in measured.items():
        draw_series(axes, series, label=name, **look)
    for share in rate_drops(models.runs[label][0]):
        axes.axvline(share, color=GREY, linewidth=1.0, linestyle=":", label="learning rate drops")
    axes.set_xlim(0, 1)
    if min(series["low"].min() for series, _ in measured.values()) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("share of training")
    axes.set_ylabel("RLoss, and flatness in RLoss")
    _set_percents(axes.xaxis, step=0.2)
    add_legend(figure, columns=3)
    set_title(figure, label)
    return figure


def select_models(
    models: Models, able: Sequence[str], preferred: Sequence[str], most: int
) -> list[str]:
    """The models that a figure has room for, in the order in which it shows them.

    Each method comes once before any comes twice, so that a sweep does not crowd others out. What
    the paper shows for another reason than its method counts as a method of its own: Adam as
    `ADAM`, and another batch size than that of most models as `BATCH_SIZE`.
    """
    settings = {label: flat_settings(models.runs[label][0].settings) for label in able}
    sizes = {label: flat.get("data.batch_size") for label, flat in settings.items()}
    usual = Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    places = {name: place for place, name in enumerate(preferred)}
    seen: Counter[str] = Counter()
    keys: dict[str, tuple[int, int]] = {}
    for label in able:
        family = models.frame.at[label, "method"]
        # A row of Table 1 keeps its name, whatever else its preset sets.
        if models.differs[label] or family not in METHOD_LABELS:
            if str(settings[label].get("model.optimizer")).startswith("Adam"):
                family = ADAM
            elif sizes[label] != usual:
                family = BATCH_SIZE
        keys[label] = (seen[family], places.get(family, len(places)))
        seen[family] += 1
    return sorted(able, key=keys.__getitem__)[:most]


def trajectory(models: Models, label: str) -> pd.DataFrame:
    """`share`, flatness `x` and RLoss `y` at the epochs that measured both; may be empty."""
    flatness, losses = models.series(label, _FLATNESS), models.series(label, _LOSS)
    if flatness is None or losses is None:
        return pd.DataFrame(columns=["share", "x", "y"])
    across, up = (series.set_index("share")["mean"] for series in (flatness, losses))
    return pd.DataFrame({"x": across, "y": up}).dropna().reset_index()


def published_path(published: pd.DataFrame | None, method: str) -> pd.DataFrame:
    """The same of a published method, sorted by share."""
    names = {"progress": "share", _FLATNESS: "x", _LOSS: "y"}
    if published is None or not set(names) <= set(published):
        return pd.DataFrame(columns=list(names.values()))
    rows = published[published["method"] == method].rename(columns=names)
    return rows[list(names.values())].dropna().sort_values("share")


def draw_series(axes: Axes, series: pd.DataFrame, **look: Any) -> None:
    """Draws the mean as a line and, for several seeds, their range as a band."""
    if len(series) <= 10:
        # A single epoch is not a line, and a few are easier to read with markers.
        look = {"marker": "o", "markersize": 2.0} | look
    axes.plot(series["share"], series["mean"], **look)
    if series["seeds"].iloc[0] > 1:
        band: dict[str, Any] = {"alpha": 0.18, "linewidth": 0, "zorder": 1}
        axes.fill_between(
            series["share"], series["low"], series["high"], color=look["color"], **band
        )


def rate_drops(run: Run) -> list[float]:
    """Shares of training at which the learning rate falls to a half or less in one step.

    A rate that changes all the time, such as a cyclic one, has none.
    """
    rows = [row for row in run.trajectory if "train/learning_rate" in row]
    rates = [row["train/learning_rate"] for row in rows]
    return [
        rows[i]["epoch"] / run.epochs
        for i in range(2, len(rows) - 1)
        if rates[i - 2] == rates[i - 1] >= 2 * rates[i] == 2 * rates[i + 1]
    ]


Panels = list[list[Axes]]


class Ruler(NamedTuple):
    """An axis that panels share: its label at the outer panels, and a function for its ticks."""

    label: str
    set_ticks: Callable[[Axis], None]


def small_multiples(titles: Sequence[str], heights: Sequence[float]) -> tuple[Figure, Panels]:
    """Lays out a column of panels for each model, several models a row.

    Returns:
        The figure, and the panels of each model from top to bottom.
    """
    columns = min(_COLUMNS, len(titles))
    rows, deep = -(-len(titles) // columns), len(heights)
    figure, grid = make_canvas(
        6.8, rows * sum(heights) + 0.8, rows * deep * columns, rows=rows * deep
    )
    cast(GridSpec, grid[0].get_gridspec()).set_height_ratios([*heights] * rows)
    panels: Panels = [
        [grid[(i // columns * deep + level) * columns + i % columns] for level in range(deep)]
        for i in range(len(titles))
    ]
    used = {id(axes) for own in panels for axes in own}
    for axes in grid:
        axes.tick_params(labelsize=_SMALL, length=2)
        if id(axes) not in used:
            axes.remove()
    for title, own in zip(titles, panels):
        lines = textwrap.wrap(title, 22, max_lines=2, placeholder=" …")
        own[0].set_title("\n".join(lines), fontsize=_SMALL + 0.5, pad=3)
    return figure, panels


def share_axes(panels: Panels, x: Ruler, *levels: Ruler) -> None:
    """Gives all panels of a level the union of their limits."""
    columns = min(_COLUMNS, len(panels))
    for level, y in enumerate(levels):
        same = [own[level] for own in panels]
        x_limits, y_limits = (
            (min(low for low, _ in limits), max(high for _, high in limits))
            for limits in ([axes.get_xlim() for axes in same], [axes.get_ylim() for axes in same])
        )
        for i, axes in enumerate(same):
            axes.set(xlim=x_limits, ylim=y_limits)
            x.set_ticks(axes.xaxis)
            y.set_ticks(axes.yaxis)
            # Ticks below the last panel of each column, labels in the last row alone: rows at
            # different distances would look like groups.
            lowest = level == len(levels) - 1 and i + columns >= len(panels)
            last = lowest and i >= (len(panels) - 1) // columns * columns
            first = i % columns == 0
            axes.tick_params(labelbottom=lowest, labelleft=first)
            axes.set_xlabel(x.label if last else "", fontsize=_SMALL)
            axes.set_ylabel(y.label if first else "", fontsize=_SMALL)


# The order of the paper's panels.
_TRAJECTORIES_FIRST = ("at", "self_supervision", "at_awp", "unlabeled")
_GUESSING: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 0.9}


def _draw_lines(axes: Axes, models: Models, label: str, lines: Sequence[Line]) -> None:
    for line in lines:
        if (series := models.series(label, *line.names)) is not None:
            draw_series(axes, series, label=line.label, **line.look)


def _draw_early_stopping(losses: Axes, errors: Axes, runs: Sequence[Run]) -> None:
    """A vertical line for each seed, and the mean of their errors as a horizontal one."""
    stopped: list[float] = []
    for run in runs:
        epoch = run.early_stopped_epoch
        if epoch is not None:
            for axes in (losses, errors):
                share = (epoch + 1) / run.epochs
                axes.axvline(share, label="early stopping", **_STOPPING)
            rows = [row for row in run.trajectory if row["epoch"] == epoch]
            stopped += [row["test/robust_error"] for row in rows if "test/robust_error" in row]
    if stopped:
        errors.axhline(fmean(stopped), **_STOPPING)


def _draw_trajectory(axes: Axes, path: pd.DataFrame) -> PathCollection:
    axes.plot(path["x"], path["y"], color=GREY, linewidth=0.6, alpha=0.7, zorder=2)
    ring: dict[str, Any] = {"markersize": 5.5, "fillstyle": "none", "color": BLACK, "zorder": 4}
    end = path.iloc[-1:]
    axes.plot(end["x"], end["y"], "o", label="end of training", linewidth=0.8, **ring)
    look: dict[str, Any] = {"s": 13, "edgecolors": "white", "linewidths": 0.3, "zorder": 3}
    look |= {"cmap": sequential(), "vmin": 0, "vmax": 1}
    return axes.scatter(path["x"], path["y"], c=path["share"], **look)


def _add_bar(figure: Figure, dots: PathCollection) -> None:
    panels = list(figure.axes)
    shrink = 0.6 if len(panels) > 2 * _COLUMNS else 1.0
    look: dict[str, Any] = {"pad": 0.01, "aspect": 35, "shrink": shrink}
    bar = add_bar(figure, dots, panels, "share of training", ticks=MultipleLocator(0.5), **look)
    bar.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    bar.yaxis.label.set_fontsize(_SMALL + 1)
    bar.tick_params(labelsize=_SMALL)


def _unit(eigenvalue: float, highest: float) -> float:
    """The power of ten that divides an eigenvalue."""
    if eigenvalue <= highest or highest <= 0:
        return 1.0
    return 10.0 ** math.ceil(math.log10(eigenvalue / highest))


def _set_percents(axis: Axis, step: float = 0.5) -> None:
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _set_few(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _set_loss_axis(axis: Axis) -> None:
    axis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _set_error_axis(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
