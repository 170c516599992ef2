"""The report's PNG and PDF files: relations of metrics, training, and landscapes (Figs. 1 to 7).

Each function returns a figure 6.8 or 5.2 inches wide, or None if there is nothing to draw.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
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
    SMALL,
    add_bar,
    add_legend,
    make_canvas,
    method_styles,
    name_points,
    sequential,
    set_title,
    share_axes,
    small_multiples,
)
from robust_flatness.plotting.landscape_figures import NAMES, set_loss_axes
from robust_flatness.reporting.correlation import TARGETS
from robust_flatness.reporting.figures import (
    ADAM,
    BATCH_SIZE,
    ERRORS,
    FLATNESS,
    LOSS,
    PUBLISHED,
    Figures,
    Relation,
    Trace,
    select_models,
    typical_rise,
)
from robust_flatness.reporting.frame import Models
from robust_flatness.run_folder.metrics import METHOD_LABELS, Weights, method_label, metric
from robust_flatness.run_folder.runs import Run

METHOD = "method"  # the gid of points of a method
_FEW = 20  # models that can all be named
_MOST_PANELS, _MOST_LINES = 20, 12
# Flatness and RLoss of the first epochs may be far from all others.
_WARM_UP = 0.05
_DASHES = {"solid": "-", "dash": "--", "dot": ":"}
_PERCENT = PercentFormatter(1.0, decimals=0, symbol=" %")
_LEGEND: dict[str, Any] = {"fontsize": FONT - 1.5, "handlelength": 1.4, "columnspacing": 1.2}
_LEGEND |= {"handletextpad": 0.4, "labelspacing": 0.35}


def relation_figure(
    *relations: Relation | None,
    title: str | None = None,
    heading: bool = False,
    published: bool = False,
) -> Figure | None:
    """Draws relations of metrics, a panel each, with the names of models beside their points.

    Bars are ± one standard deviation over seeds. Several panels have a legend instead of names.

    Args:
        relations: Those that are None are left out.
        title: A line above the figure.
        heading: Whether to state the correlations.
        published: Whether to draw the paper's models as faint rings behind ours. They are of
            CIFAR-10, so compare shapes rather than places.
    """
    shown = [relation for relation in relations if relation is not None]
    if not shown:
        return None
    figure, all_axes = make_canvas(6.8, 4.6 if len(shown) == 1 else 4.0, len(shown))
    for axes, relation in zip(all_axes, shown):
        _set_axes(axes, relation)
        if heading:
            lines = [
                f"{of}: {result.text}, {result.over}".removeprefix(": ")
                for of, result in relation.correlations.items()
                if published or not of
            ]
            axes.set_title("\n".join(lines), loc="left", fontsize=FONT - 1, color=GREY)
            if relation.x.startswith("flatness/"):
                axes.set_xlabel(f"{axes.get_xlabel()} (lower is flatter)")
        points = _draw_relation(axes, relation, published)
        if relation.y.startswith(("gap/", "last_minus_best/")):
            axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    set_title(figure, title)
    add_legend(figure, 5, **_LEGEND)
    if len(shown) == 1:
        names = dict(enumerate(points.index))
        left = name_points(axes, points[["x", "y"]].to_numpy(float), names)
        # Methods need a legend if a point of theirs has no name.
        named = set(points["method"]) - set(points["method"].iloc[left])
        add_legend(figure, 5, set(map(method_label, named)), **_LEGEND)
    return figure


def sweeps_figure(figures: Figures, *, title: str | None = None) -> Figure | None:
    """Draws sweeps, from light to dark with the value of the setting, with a line through each."""
    relation = figures.hyperparameters()
    sweeps = [sweep for sweep in figures.sweeps() if not sweep.is_published]
    if relation is None or not sweeps:
        return None
    figure, (axes,) = make_canvas(6.8, 4.6)
    _set_axes(axes, relation)
    for trace in relation.traces:
        if trace.kind == "line" and not trace.is_published:
            _draw_line(axes, trace)
    for sweep in sweeps:
        # Shares of white.
        shares = np.linspace(0.7, 0, len(sweep.points))[:, None]
        look = {"facecolors": shares + (1 - shares) * to_rgb(sweep.color), "color": None}
        _draw_points(axes, sweep, **look, edgecolors=sweep.color, linewidths=0.8)
    note = "light to dark: from the lowest to the highest value; dotted: least squares"
    axes.set_title(note, loc="left", fontsize=FONT - 1, color=GREY)
    set_title(figure, title)
    add_legend(figure, 5, **_LEGEND)
    points = pd.concat([sweep.points for sweep in sweeps])
    ends = {label for sweep in sweeps for label in sweep.points.index[[0, -1]]}
    shown = points.index.isin(ends) | (len(points) <= _FEW)
    names = {i: name for i, name in enumerate(points["name"]) if shown[i]}
    name_points(axes, points[["x", "y"]].to_numpy(float), names)
    return figure


def correlations_figure(
    figures: Figures, weights: Weights = "final", *, title: str | None = None
) -> Figure | None:
    """Draws Kendall's coefficient of each measure with each loss, error and gap.

    On test images unless a label says otherwise. A panel each for our runs and for the paper's
    models, both also with train RErr held fixed.
    """
    table = figures.mapped_correlations
    table = table[table["weights"] == weights] if len(table) else table
    if table.empty or "runs" not in set(table["of"]):
        return None
    grids = {
        key: rows.pivot(index="x", columns="y", values="kendall")
        for key, rows in table.groupby(["of", "given"], sort=False)
    }
    names = list(dict.fromkeys(table.loc[table["of"] == "runs", "x"]))
    targets = [name for name in TARGETS if name in set(table["y"])]
    figure, all_axes = make_canvas(7.6, 1.9 + 0.2 * len(names), len(grids))
    for axes, ((of, given), grid) in zip(all_axes, grids.items()):
        values = grid.reindex(index=names, columns=targets).to_numpy(float)
        look: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "aspect": "auto"}
        drawn = axes.imshow(values, **look)
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 else BLACK
            text = "" if math.isnan(value) else f"{value:.2f}".replace("0.", ".")
            axes.text(j, i, text, ha="center", va="center", fontsize=SMALL - 2, color=color)
        axes.grid(False)
        axes.set_title(f"{of}\n{'given train RErr' if given else 'raw'}", fontsize=SMALL)
        words = [metric(target).title.removesuffix(", test") for target in targets]
        axes.set_xticks(range(len(targets)), words, rotation=90, fontsize=SMALL)
        words = [metric(name).title.removesuffix(", test") for name in names]
        first = axes is all_axes[0]
        axes.set_yticks(range(len(names)), words if first else [""] * len(names), fontsize=SMALL)
    add_bar(figure, drawn, all_axes, "Kendall's τ", pad=0.01, aspect=30)
    set_title(figure, title)
    return figure


def _draw_relation(axes: Axes, relation: Relation, published: bool) -> pd.DataFrame:
    """Draws a relation, and returns our models in it."""
    own = [trace for trace in relation.traces if not trace.is_published]
    arrows = [trace for trace in own if trace.kind == "arrows"]
    moved = {label for trace in arrows for label in trace.points.index}
    drawn: list[pd.DataFrame] = []
    for trace in own:
        if trace.kind == "points":
            points = trace.points
            drawn.append(points[points.index.isin(moved)] if arrows else points)
            _draw_points(axes, trace, drawn[-1])
        elif trace.kind == "arrows":
            _draw_arrows(axes, trace)
        else:
            _draw_line(axes, trace)
    theirs = [t.points for t in relation.traces if t.is_published and t.kind == "points"]
    if published and theirs:
        look: dict[str, Any] = {"facecolors": "none", "edgecolors": "#B0B0B0", "linewidths": 0.7}
        axes.scatter("x", "y", s=14, data=pd.concat(theirs), label=PUBLISHED, zorder=1, **look)
    if arrows:
        look = {"s": 22, "edgecolors": GREY, "linewidths": 0.9}
        axes.scatter([], [], facecolors=GREY, label="last weights", **look)
        axes.scatter([], [], facecolors="white", label="early-stopped weights", **look)
    return pd.concat(drawn)


def _draw_points(axes: Axes, trace: Trace, points: pd.DataFrame | None = None, **look: Any) -> None:
    """Draws models, or some of them, with bars over seeds."""
    points = trace.points if points is None else points
    if points.empty:
        return
    bars = points[(points["dx"] > 0) | (points["dy"] > 0)]
    if len(bars):
        bar: dict[str, Any] = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.6, "zorder": 3}
        axes.errorbar(bars["x"], bars["y"], bars["dy"], bars["dx"], ecolor=trace.color, **bar)
    style: dict[str, Any] = {"color": trace.color, "edgecolors": "white", "linewidths": 0.5, **look}
    style |= {"marker": trace.marker, "label": trace.label, "gid": METHOD}
    axes.scatter(points["x"], points["y"], s=30, zorder=4, **style)


def _draw_arrows(axes: Axes, trace: Trace) -> None:
    places = list(zip(trace.points["x"], trace.points["y"]))
    ring: dict[str, Any] = {"marker": trace.marker, "facecolors": "white", "linewidths": 0.9}
    x, y = zip(*places[1::2])
    axes.scatter(x, y, s=22, edgecolors=trace.color, zorder=3, **ring)
    arrow = {"arrowstyle": "->", "color": trace.color, "linewidth": 0.9, "mutation_scale": 8}
    arrow |= {"shrinkA": 0, "shrinkB": 3}
    for start, end in zip(places[::2], places[1::2]):
        if start != end:
            axes.annotate("", end, start, arrowprops=arrow, zorder=3)


def _draw_line(axes: Axes, trace: Trace) -> None:
    look: dict[str, Any] = {"color": trace.color, "linestyle": _DASHES[trace.dash]}
    if not trace.method:
        look["label"] = trace.label
    if trace.kind == "vertical":
        axes.axvline(trace.points["x"].iloc[0], linewidth=0.9, zorder=1, **look)
    elif trace.kind == "diagonal":
        axes.axline((0, 0), slope=1, linewidth=0.9, zorder=1, **look)
    else:
        axes.plot(trace.points["x"], trace.points["y"], linewidth=1.2, zorder=2, **look)


def _set_axes(axes: Axes, relation: Relation) -> None:
    """Labels both axes; shares are in percent."""
    axes.margins(0.06, 0.08)
    for axis, name in ((axes.xaxis, relation.x), (axes.yaxis, relation.y)):
        axis.set_label_text(metric(name).title)
        if metric(name).is_share:
            axis.set_major_formatter(_PERCENT)


# A line over epochs: its label, metrics, of which the first measured one is drawn, and its look.
_Lines = Sequence[tuple[str, tuple[str, ...], dict[str, Any]]]


def _look(color: str, width: float = 1.4, style: Any = "-") -> dict[str, Any]:
    return {"color": color, "linewidth": width, "linestyle": style}


_TEST, _TRAIN = _look(ORANGE), _look(BLUE, style=(0, (1, 1)))
_STOPPING, _GUESSING = _look(BLACK, 0.5, "-."), _look(GREY, 0.9, ":")
# `train_eval` has fixed weights and the attack of `test`; `train` stands in if it was not measured.
_TRAIN_LOSS = ("train_eval/robust_loss", "train/robust_loss")
_LOSSES: _Lines = (
    ("test, incorrect when clean", ("test/robust_loss_incorrect",), _look(PURPLE, 0.7)),
    ("test", (LOSS,), _TEST),
    ("test, correct when clean", ("test/robust_loss_correct",), _look(GREEN, 0.7)),
    ("train", _TRAIN_LOSS, _TRAIN),
)
_ERRORS: _Lines = (
    ("test", ("test/robust_error",), _TEST),
    ("train", ("train_eval/robust_error", "train/robust_error"), _TRAIN),
)
_MEASURES: _Lines = (
    ("RLoss, train", _TRAIN_LOSS, _TRAIN),
    ("RLoss, test", (LOSS,), _TEST),
    ("average-case flatness, test", (FLATNESS,), _look(GREEN, style="--")),
    ("worst-case flatness, test", ("flatness/worst/test",), _look(PURPLE, style="-.")),
)


def curves_figure(models: Models, *, title: str | None = None) -> Figure | None:
    """Draws train and test RLoss and RErr during training, two panels for each model (Fig. 2).

    Lines are means over seeds, bands reach from the lowest seed to the highest. All models share
    their axes. That of losses is logarithmic and cut at 0.03 and 15, because losses on incorrect
    and on training examples differ by factors of hundreds.
    """
    measured = {label: models.series(label, LOSS, "test/robust_error") for label in models.labels}
    able = [label for label, series in measured.items() if series is not None]
    shown = select_models(models, able, ["at"], _MOST_PANELS)
    if not shown:
        return None
    figure, panels = small_multiples(shown, heights=(1.15, 0.8))
    for label, (losses, errors) in zip(shown, panels):
        for axes, lines in ((losses, _LOSSES), (errors, _ERRORS)):
            axes.xaxis.set(major_locator=MultipleLocator(0.5), major_formatter=_PERCENT)
            for name, names, look in lines:
                if (series := models.series(label, *names)) is not None:
                    draw_series(axes, series, label=name, **look)
        if number := models.runs[label][0].num_classes:
            losses.axhline(math.log(number), label=f"guessing (ln {number})", **_GUESSING)
        stops = [r for r in models.runs[label] if r.early_stopped_epoch is not None]
        for run in stops:
            for axes in (losses, errors):
                share = (cast(int, run.early_stopped_epoch) + 1) / run.epochs
                axes.axvline(share, label="early stopping", **_STOPPING)
        rows = [r for run in stops for r in run.trajectory if r["epoch"] == run.early_stopped_epoch]
        if stopped := [row["test/robust_error"] for row in rows if "test/robust_error" in row]:
            errors.axhline(fmean(stopped), **_STOPPING)
        losses.set(xlim=(0, 1), yscale="log")
        low, high = losses.get_ylim()
        losses.set_ylim(max(low, 0.03), min(high, 15.0))
        errors.set(xlim=(0, 1), ylim=(0, errors.get_ylim()[1]))
        losses.yaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3, 10]))
        losses.yaxis.set_minor_locator(NullLocator())
        losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        errors.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
        errors.yaxis.set_major_formatter(_PERCENT)
    share_axes(panels, "share of training", "RLoss", "RErr")
    add_legend(figure, columns=3)
    set_title(figure, title)
    return figure


def trajectories_figure(figures: Figures, *, title: str | None = None) -> Figure | None:
    """Draws test RLoss against flatness during training, a panel for each model (Fig. 5).

    Points are colored by the share of training; a ring marks the last. All panels share their axes,
    which may leave points of the first twentieth of training outside. Trajectories of the paper are
    pale, behind models of their method: of other data, and possibly the highest of ten directions
    instead of the mean.
    """
    traces = figures.paths()
    paths = {str(trace.model): trace for trace in traces if not trace.is_published}
    theirs = {trace.method: trace.points for trace in traces if trace.is_published}
    # The order of the paper's panels.
    first = ("at", "self_supervision", "at_awp", "unlabeled")
    shown = select_models(figures.models, list(paths), first, _MOST_PANELS)
    if not shown:
        return None
    figure, panels = small_multiples(shown, heights=(1.35,))
    for label, (axes,) in zip(shown, panels):
        path, published = paths[label].points, theirs.get(paths[label].method)
        kept = path[path["share"] > _WARM_UP]
        kept = kept if len(kept) else path
        if published is not None:
            look: dict[str, Any] = {"markersize": 2.2, "linewidth": 0.6, "zorder": 1}
            axes.plot("x", "y", "o-", data=published, color="#C4C4C4", label=PUBLISHED, **look)
            kept = pd.concat([kept, published])
        axes.plot(path["x"], path["y"], color=GREY, linewidth=0.6, alpha=0.7, zorder=2)
        look = {"markersize": 5.5, "fillstyle": "none", "color": BLACK, "zorder": 4}
        axes.plot("x", "y", "o", data=path[-1:], label="end of training", linewidth=0.8, **look)
        look = {
            "s": 13,
            "edgecolors": "white",
            "linewidths": 0.3,
            "zorder": 3,
            "vmin": 0,
            "vmax": 1,
        }
        look |= {"c": path["share"], "cmap": sequential()}
        dots = axes.scatter(path["x"], path["y"], **look)
        for name, set_limits in (("x", axes.set_xlim), ("y", axes.set_ylim)):
            low, high = kept[name].min(), kept[name].max()
            margin = 0.08 * (high - low) or 0.1
            set_limits(min(0.0, low) - margin, high + margin)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    share_axes(panels, "average-case flatness", "RLoss, test")
    all_axes = list(figure.axes)
    look = {"pad": 0.01, "aspect": 35, "shrink": 0.6 if len(all_axes) > 10 else 1.0}
    bar = add_bar(figure, dots, all_axes, "share of training", ticks=MultipleLocator(0.5), **look)
    bar.yaxis.set_major_formatter(_PERCENT)
    bar.yaxis.label.set_fontsize(SMALL + 1)
    bar.tick_params(labelsize=SMALL)
    add_legend(figure)
    set_title(figure, title)
    return figure


def epochs_figure(models: Models, label: str) -> Figure | None:
    """Draws RLoss, flatness and curvature of one model during training (long version).

    λ_max is divided by the power of ten that brings it among the others. Dotted lines are drops of
    the learning rate. Losses alone are no figure: they are in `curves_figure`.
    """
    measured = {
        name: (series, look)
        for name, names, look in _MEASURES
        if (series := models.series(label, *names)) is not None
    }
    eigenvalues = models.series(label, "hessian/max_eigenvalue")
    if eigenvalues is None and set(measured) <= {"RLoss, train", "RLoss, test"}:
        return None
    if eigenvalues is not None:
        most = max((series["high"].max() for series, _ in measured.values()), default=math.inf)
        ratio = eigenvalues["high"].max() / most if most > 0 else 1.0
        unit = 10.0 ** math.ceil(math.log10(ratio)) if ratio > 1 else 1.0
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
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.xaxis.set_major_formatter(_PERCENT)
    add_legend(figure, columns=3)
    set_title(figure, label)
    return figure


def draw_series(axes: Axes, series: pd.DataFrame, **look: Any) -> None:
    """Draws the mean as a line and, for several seeds, their range as a band."""
    if len(series) <= 10:
        # A single epoch is not a line, and a few are easier to read with markers.
        look = {"marker": "o", "markersize": 2.0} | look
    axes.plot(series["share"], series["mean"], **look)
    if series["seeds"].iloc[0] > 1:
        band: dict[str, Any] = {"alpha": 0.18, "linewidth": 0, "color": look["color"], "zorder": 1}
        axes.fill_between("share", "low", "high", data=series, **band)


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


# In the order of the paper's two rows of panels.
_LANDSCAPES_FIRST = (
    *("at", "label_smoothing", "mart", "entropy_sgd", "self_supervision", "trades"),
    *("at_awp", "mish", BATCH_SIZE, ADAM, "at_scaled_half", "at_scaled_double"),
)
_STROKES: Mapping[str, Any] = dict(zip("os^Dv", ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")))


def landscapes_figure(figures: Figures, *, title: str | None = None) -> Figure | None:
    """Draws RLoss along random and adversarial directions, with RErr beside it (Fig. 4).

    Lines are of the last weights. Losses are on a logarithmic axis cut at 15. The models of the
    paper's figure come first, 12 at most. Errors are means over seeds; a dash is what was not
    measured.
    """
    names = {kind: f"final/{kind}" for kind in ("random", "adversarial")}
    lines = {kind: {t.model: t for t in figures.landscape(name)} for kind, name in names.items()}
    lines = {kind: own for kind, own in lines.items() if own}
    if not lines:
        return None
    able = [label for label in figures.models.labels if any(label in own for own in lines.values())]
    shown = select_models(figures.models, able, _LANDSCAPES_FIRST, _MOST_LINES)
    looks = _looks(figures.models, shown)
    figure, all_axes = make_canvas(6.8, 3.4, len(lines) + 1)
    *panels, table = all_axes
    cast(GridSpec, table.get_gridspec()).set_width_ratios([4.2 / len(lines)] * len(lines) + [2.6])
    for axes, (kind, own) in zip(panels, lines.items()):
        for place, label in enumerate(shown):
            if label in own:
                # Markers of different lines stand at different steps.
                every = (place % 3, max(1, len(own[label].points) // 5))
                look = {"markevery": every, "label": label, **looks[label]}
                axes.plot(own[label].points["x"], own[label].points["y"], **look)
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
        axes.set_xlabel(f"step s along {NAMES[kind]}", fontsize=FONT - 1.5)
        axes.margins(x=0)
        axes.tick_params(labelleft=axes is panels[0])
    drawn = [own[label].points["y"].to_numpy() for own in lines.values() for label in own]
    set_loss_axes(panels, drawn)
    panels[0].set_ylabel("RLoss")
    _draw_table(table, figures.models, looks)
    set_title(figure, title)
    return figure


def _looks(models: Models, shown: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Looks by label. The second model of a method takes one that no other method has."""
    styles = method_styles(models.methods, METHOD_LABELS)
    methods = models.frame.loc[list(shown), "method"]
    spare = [style for method, style in styles.items() if method not in set(methods)]
    looks: dict[str, dict[str, Any]] = {}
    for label, again in methods.duplicated().items():
        color, marker = spare.pop(0) if again else styles[methods[label]]
        look = {"color": color, "marker": marker, "linestyle": _STROKES[marker]}
        looks[str(label)] = look | {"linewidth": 1.2, "markersize": 3.5}
    return looks


def _draw_table(axes: Axes, models: Models, looks: Mapping[str, dict[str, Any]]) -> None:
    """A legend with the test RErr by each attack."""
    errors = {attack: models.column(name)["mean"] for attack, name in zip(_ATTACKS, ERRORS)}
    measured = [attack for attack, means in errors.items() if set(means.index) & set(looks)]
    columns = dict(zip(measured, (1.0, 0.7)))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(looks), 8) + 0.5, -1.6)
    text: dict[str, Any] = {"fontsize": FONT - 1.5, "va": "center"}
    if columns:
        axes.text(1.0, -1.2, "test RErr in %", ha="right", **text)
    for attack, x in columns.items():
        axes.text(x, -0.5, attack, ha="right", **text)
    for place, (label, look) in enumerate(looks.items()):
        y = place + 0.5
        axes.plot([0.0, 0.05, 0.1], [y] * 3, markevery=[1], **look)
        axes.text(0.13, y, textwrap.fill(label, 22), linespacing=0.9, **text)
        for attack, x in columns.items():
            error = errors[attack].get(label)
            axes.text(x, y, "–" if error is None else f"{100 * error:.1f}", ha="right", **text)


_ATTACKS = ("AutoAttack", "PGD")  # of `ERRORS`


def schematic_figure(run: Run | None) -> Figure | None:
    """Draws the measure: how far RLoss rises from the weights w to w + ν (Fig. 3).

    One random direction ν is drawn in full, the others pale. The arrow is the loss at w + ν minus
    that at w, both attacked anew; its mean over directions is average-case flatness at the ξ of the
    landscape.
    """
    rise = typical_rise(run)
    if run is None or rise is None:
        return None
    steps, curves, typical, left, low, high, flatness = rise
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
