"""Plotly figures of the HTML page. The page's script shows and hides their traces by `meta`.

Every trace of a model has `meta` with its `method`, its `model` (the label) and whether it is
`published`. Texts of hovers are stored once: the points of a trace have `ids`, which name them.
`layout.meta` is a sentence for the caption.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from robust_flatness.plotting.canvas import BLUE, ORANGE
from robust_flatness.reporting.figures import (
    ERRORS,
    FLATNESS,
    GAPS,
    LOSS,
    PUBLISHED,
    TRAIN_FLATNESS,
    Figures,
    Relation,
    Trace,
    typical_rise,
)
from robust_flatness.reporting.frame import WEIGHTS, Models, flat_settings
from robust_flatness.run_folder.metrics import (
    Weights,
    errors_by_other_attacks,
    method_label,
    metric,
)
from robust_flatness.run_folder.runs import Run

X_AXES = (FLATNESS, "flatness/worst/test", TRAIN_FLATNESS, "flatness/clean_average/test")
Y_AXES = (LOSS, "test/robust_error", "test/autoattack_error")
_CURVATURE = "hessian/max_eigenvalue"
_GREY = "#8A93A0"  # readable on light and on dark pages
_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
# Models of one method share a color; the later ones have other marks.
_MARKS = ("", "circle", "square", "diamond", "cross", "x")
_MOST_LINES = 12  # of settings in a hover
_HIGHEST, _LOWEST = 15.0, 1e-3
_TICKS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 30, 100)

_Drawn = dict[str, go.Figure]


def page_figures(figures: Figures) -> dict[str, _Drawn]:
    """The figures of each section of the page, by the values of its selectors."""
    heights = y_axes(figures.models)
    errors = sorted(heights[1:], key=lambda name: (name == ERRORS[1], name != ERRORS[0]))
    error = next((e for e in errors if len(figures.models.column(e))), ERRORS[0])
    relations = {
        "|".join(key): figures.relation(*key) for key in itertools.product(X_AXES, heights, WEIGHTS)
    }
    views = {
        "Early stopping: RLoss": figures.early_stopping(),
        "Early stopping: RErr": figures.early_stopping(error),
        "RErr against RLoss, with the loss of guessing": figures.kink(error),
        "Hyper-parameters: a trend for each sweep": figures.hyperparameters(),
        "Flatness on training against test images": figures.train_flatness(),
        "Generalization gap": figures.relation(FLATNESS, GAPS[0]),
        "Last minus early-stopped RLoss": figures.relation(FLATNESS, GAPS[1]),
        "RLoss against curvature": figures.relation(_CURVATURE, LOSS),
    }
    more = {
        "RErr against ε": _details(figures, "error_curve", "eps", "ε"),
        "RErr of each class": _details(figures, "class_errors", "class", "class"),
        **_correlations(figures.mapped_correlations),
    }
    single = {
        "paths": _paths(figures),
        "losses": _curves(figures, "losses"),
        "errors": _curves(figures, "errors"),
        "schematic": _schematic(figures.example),
    }
    return {
        "relation": {key: _scatter(panel) for key, panel in relations.items() if panel},
        "views": {title: _scatter(panel) for title, panel in views.items() if panel}
        | {title: figure for title, figure in more.items() if figure},
        "landscapes": _landscapes(figures),
        **{name: {} if figure is None else {"": figure} for name, figure in single.items()},
    }


def _scatter(panel: Relation) -> go.Figure:
    figure = go.Figure(layout=_layout(panel.x, panel.y))
    for trace in panel.traces:
        x, y = (_digits(trace.points.get(axis, ())) for axis in "xy")
        faint = trace.is_published
        if trace.kind == "points":
            bars = {
                f"error_{axis}": {
                    "type": "data",
                    "color": _faded(trace.color, 0.35),
                    "thickness": 1,
                    "width": 0,
                    "array": _digits(trace.points[f"d{axis}"]),
                    "visible": bool(trace.points[f"d{axis}"].any()),
                }
                for axis in "xy"
            }
            figure.add_scatter(
                x=x,
                y=y,
                **bars,
                ids=[_id(label, trace.weights, faint) for label in trace.points.index],
                mode="markers",
                name=_name(trace),
                marker=_marker(trace, 7 if faint else 11),
                hovertemplate="%{text}<extra></extra>",
                meta=_meta(trace),
            )
        elif trace.kind == "arrows":
            color = _faded(trace.color, 0.35 if faint else 0.75)
            head = {"symbol": "arrow", "angleref": "previous", "color": color, "line": {"width": 0}}
            # Each arrow is two points, and a gap before the next one.
            gaps = list(zip(*[iter(zip(x, y, trace.points.index))] * 2))
            figure.add_scatter(
                x=[v for start, end in gaps for v in (start[0], end[0], None)],
                y=[v for start, end in gaps for v in (start[1], end[1], None)],
                ids=[v for _, end in gaps for v in ("", _id(end[2], trace.weights, faint), "")],
                mode="lines+markers",
                line={"color": color, "width": 1 if faint else 1.5},
                marker={**head, "size": [0, 9, 0] * len(gaps)},
                hovertemplate="%{text}<extra></extra>",
                meta=_meta(trace),
            )
        elif trace.kind == "line":
            figure.add_scatter(**_line(trace), hoverinfo="skip")
        elif trace.kind == "vertical":
            text = {"text": f" {trace.label}", "font_color": _GREY}
            figure.add_vline(x[0], line=_line(trace)["line"], annotation=text)
        else:
            low, high = min(*x, *y), max(*x, *y)
            ends = {"x0": low, "y0": low, "x1": high, "y1": high}
            figure.add_shape(type="line", **ends, line=_line(trace)["line"])
    sentences = [
        f"{'Published (CIFAR-10)' if of else 'Your runs'}: {result.text}; "
        f"of {result.num_methods} methods, {result.over}."
        for of, result in panel.correlations.items()
    ]
    sentences = sentences or ["Measured for too few models for a correlation."]
    figure.layout.meta = " ".join(filter(None, [panel.note, *sentences]))
    return figure


def _paths(figures: Figures) -> go.Figure | None:
    """Trajectories through the plane of flatness and RLoss; `customdata` is the progress."""
    paths = figures.paths()
    if not paths:
        return None
    figure = go.Figure(layout=_layout(FLATNESS, LOSS))
    for trace in paths:
        color = _faded(trace.color, 0.3 if len(paths) > 8 else 0.6)
        look = {
            "mode": "lines+markers",
            "line": {"color": color, "width": 1.3, "dash": trace.dash},
            "marker": _marker(trace, 3),
            "opacity": 0.5 if trace.is_published else 1,
        }
        text = "%{customdata:.0%} of training<br>average-case flatness: %{x:.2f}<br>RLoss: %{y:.2f}"
        share = _digits(trace.points["share"])
        figure.add_scatter(**_line(trace, text) | look, customdata=share)
    # The ranges of the whole training, so that the axes stand still.
    for axis, get in ((figure.layout.xaxis, "x"), (figure.layout.yaxis, "y")):
        values = pd.concat([trace.points[get] for trace in paths])
        ends = [trace.points[get].iloc[-1] for trace in paths]
        low, high = min(values.quantile(0.02), *ends), max(values.quantile(0.98), *ends)
        room = 0.08 * ((high - low) or 1)
        axis.range = [low - room, high + room]
    return figure


# Metrics over epochs, by panel: label, stroke and width.
_CURVES = {
    "losses": {
        LOSS: ("test", "solid", 2.4),
        "train/robust_loss": ("training batches", "dash", 1.6),
        "train_eval/robust_loss": ("train", "longdashdot", 1.2),
        "test/robust_loss_correct": ("test, correct when clean", "dot", 1.6),
        "test/robust_loss_incorrect": ("test, incorrect when clean", "dashdot", 1.2),
    },
    "errors": {
        "test/robust_error": ("test", "solid", 2.4),
        "train/robust_error": ("training batches", "dash", 1.6),
        "train_eval/robust_error": ("train", "longdashdot", 1.2),
        "val/robust_error": ("early-stopping images", "dot", 1.2),
    },
}


def _curves(figures: Figures, panel: str) -> go.Figure | None:
    """`losses` or `errors` over epochs, of all models; the script chooses among them."""
    title, number = ("RErr, in %", ".1%") if panel == "errors" else ("RLoss", ".2f")
    layout = _layout("", next(iter(_CURVES[panel])), showlegend=True)
    figure = go.Figure(layout=layout)
    figure.layout.update(xaxis_title_text="epoch", uirevision="curves")
    figure.update_yaxes(title_text=title, rangemode="tozero")
    drawn: list[dict[str, Any]] = []
    for name, (label, dash, width) in _CURVES[panel].items():
        own: list[dict[str, Any]] = []
        for model, runs in figures.models.runs.items():
            if (series := figures.models.series(model, name)) is not None:
                total = max(run.epochs for run in runs)
                epochs = [round(share * total) - 1 for share in series["share"]]
                points = pd.DataFrame({"x": epochs, "y": series["mean"]})
                trace = figures.line(model, points, dash=dash, width=width)
                mark = _MARKS[figures.rank[model] % len(_MARKS)]
                look: dict[str, Any] = {
                    "x": epochs,
                    "mode": "lines+markers" if mark else "lines",
                    "marker": {"symbol": mark or "circle", "size": 7, "maxdisplayed": 6},
                    "legendgroup": name,
                }
                own.append(_line(trace, f"{label}: %{{y:{number}}}<br>epoch %{{x}}") | look)
        if own:
            line = {"color": _GREY, "dash": dash, "width": width}
            look = {"name": label, "legendgroup": name, "mode": "lines", "showlegend": True}
            figure.add_scatter(x=[None], y=[None], line=line, **look)
        drawn += own
    if not drawn:
        return None
    for one in drawn:
        figure.add_scatter(**one)
    top = max(max(one["y"]) for one in drawn)
    for model, runs in figures.models.runs.items():
        stops = [r.early_stopped_epoch for r in runs if r.early_stopped_epoch is not None]
        # A gap between the lines of seeds.
        x = [x for stop in stops for x in (stop, stop, None)]
        line = _line(figures.line(model, pd.DataFrame(), dash="dashdot", width=1))
        figure.add_scatter(**line | {"x": x, "y": [0, top, None] * len(stops)}, hoverinfo="skip")
    if panel == "losses":
        for loss in figures.guessing.values():
            figure.add_hline(loss, line={"color": _GREY, "width": 1.2, "dash": "dot"})
    return figure


def _details(figures: Figures, name: str, x: str, title: str) -> go.Figure | None:
    """RErr of each model against another number than an epoch."""
    lines = figures.details_lines(name, x)
    figure = go.Figure(layout=_layout("", ERRORS[1]))
    figure.layout.xaxis.title.text = title
    for trace in lines:
        hover = f"{title} %{{x:.3g}}: RErr %{{y:.1%}}"
        if name == "class_errors":
            worst = trace.points.loc[trace.points["y"].idxmax()]
            hover += f"<br>largest, of class {worst['x']:g}: {100 * worst['y']:.1f} %"
        figure.add_scatter(**_line(trace, hover) | {"mode": "lines+markers"})
    figure.layout.meta = "Last weights, test images, means over seeds."
    return figure if lines else None


def _correlations(table: pd.DataFrame) -> _Drawn:
    """Kendall's coefficients by source, weights and what is held fixed."""
    drawn: _Drawn = {}
    for (of, weights, given), rows in table.groupby(["of", "weights", "given"], sort=False):
        texts = []
        for _, row in rows.iterrows():
            lines = [f"{row['models']} models, {row['methods']} methods"]
            for name in ("pearson", "spearman", "kendall"):
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
                lines.append(f"{name.capitalize()}: {row[name]:.2f}{interval}")
            texts.append("<br>".join(lines))
        figure = go.Figure(layout=_layout("", ""))
        figure.add_heatmap(
            x=_titles(rows["y"]),
            # Short lines leave room on a phone.
            y=["<br>".join(textwrap.wrap(_plain(title), 18)) for title in _titles(rows["x"])],
            z=_digits(rows["kendall"]),
            customdata=texts,
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}<br>%{x}<br>%{customdata}<extra></extra>",
            colorscale="RdBu",
            reversescale=True,
            zmin=-1,
            zmax=1,
            colorbar={"title": {"text": "τ"}, "outlinewidth": 0},
            meta={"method": None, "model": None, "published": str(of) != "runs"},
        )
        figure.layout.yaxis.autorange = "reversed"
        of_whom = "published" if str(of) != "runs" else "your runs"
        words = [of_whom, "early-stopped weights" if weights == "early_stopped" else "last weights"]
        words += ["train RErr held fixed"] if given else []
        figure.layout.meta = (
            "Kendall's τ-b of each measure with each loss, error and gap over models, of any "
            "number of seeds; with train RErr held fixed, a partial coefficient."
        )
        drawn[f"Correlations: {', '.join(words)}"] = figure
    return drawn


def _titles(names: Iterable[str]) -> list[str]:
    return [metric(name).title.removesuffix(", test") for name in names]


def _landscapes(figures: Figures) -> _Drawn:
    """Losses along directions by name, and surfaces by `name|model`."""
    models = figures.models
    names = {n for runs in models.runs.values() for run in runs for n in run.landscapes}
    drawn: dict[str, go.Figure | None] = {}
    # The last weights and random directions come first.
    for name in sorted(names, key=lambda n: (n[:5] != "final", not n.endswith("random"), n)):
        if name.endswith("surface"):
            drawn |= {f"{name}|{label}": _surface(figures, name, label) for label in models.labels}
        else:
            drawn[name] = _landscape(figures, name)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _landscape(figures: Figures, name: str) -> go.Figure | None:
    lines = figures.landscape(name)
    if not lines:
        return None
    weights: Weights = "early_stopped" if name.startswith("early_stopped") else "final"
    figure = go.Figure(layout=_layout("", LOSS, showlegend=True))
    figure.layout.xaxis.title.text = "step along the direction"
    for trace in lines:
        points = trace.points.clip(
            lower={"x": -np.inf, "y": _LOWEST, "low": _LOWEST, "high": _LOWEST}
        )
        errors = (figures.models.mean(str(trace.model), error, weights) for error in ERRORS)
        error = next((f", RErr {100 * e:.1f} %" for e in errors if e is not None), "")
        named = replace(trace, points=points, label=f"{trace.label}{error}", width=2)
        line = _line(named, "step %{x:.2f}: RLoss %{y:.3g}") | {"legendgroup": trace.model}
        edge = line | {"hoverinfo": "skip", "line": {"width": 0, "color": trace.color}}
        fill = {"fill": "tonexty", "fillcolor": _faded(trace.color, 0.12)}
        figure.add_scatter(**edge | {"y": _digits(points["low"])})
        figure.add_scatter(**edge | fill | {"y": _digits(points["high"])})
        figure.add_scatter(**line | {"showlegend": True})
    lowest = max(min(trace.points["low"].min() for trace in lines), _LOWEST)
    highest = max(trace.points["high"].max() for trace in lines)
    high = 1.1 * (min(highest, _HIGHEST) if lowest < _HIGHEST else highest)
    ends = [math.log10(min(lowest, _HIGHEST) / 1.1), math.log10(high)]
    figure.update_yaxes(type="log", title_text="RLoss (logarithmic)", tickvals=_TICKS, range=ends)
    return figure


def _surface(figures: Figures, name: str, label: str) -> go.Figure | None:
    runs = figures.models.runs[label]
    seeds = [run.landscapes[name] for run in runs if name in run.landscapes]
    if not seeds or not np.isfinite(seeds[0].losses).all():
        return None
    # Plotly takes rows along the vertical axis; the first direction is the horizontal one.
    grid = np.maximum(seeds[0].curves.T, _LOWEST)
    # A flat surface has a range as well.
    low = float(np.log10(grid.min()))
    high = max(float(np.log10(grid.max())), low + 0.01)
    steps = _digits(seeds[0].coordinates)
    figure = go.Figure(layout=_layout("", ""))
    figure.update_xaxes(title_text="step along the first direction")
    figure.update_yaxes(title_text="step along the second direction")
    bar = {"title": {"text": "RLoss"}, "outlinewidth": 0, "tickvals": np.log10(_TICKS).tolist()}
    figure.add_contour(
        x=steps,
        y=steps,
        z=[_digits(row) for row in np.log10(grid)],
        customdata=[_digits(row) for row in grid],
        colorscale="Viridis",
        contours={"start": low, "end": high, "size": (high - low) / 16},
        zmin=low,
        zmax=high,
        line={"width": 0.5, "color": "rgba(255,255,255,0.5)"},
        colorbar={**bar, "ticktext": [f"{tick:g}" for tick in _TICKS]},
        hovertemplate="(%{x:.2f}, %{y:.2f}): RLoss %{customdata:.3g}<extra></extra>",
        meta=_meta(figures.line(label, pd.DataFrame())),
    )
    return figure


def _schematic(run: Run | None) -> go.Figure | None:
    """What average-case flatness measures, drawn from a run's own landscape; None without one."""
    rise = typical_rise(run)
    if run is None or rise is None:
        return None
    low, high = rise.here, rise.beyond
    figure = go.Figure(layout=_layout("", ""))
    title = "step s along a direction ν, ‖ν‖ = ξ‖w‖"
    figure.update_xaxes(title_text=title, tickvals=[-1, 0, 1], range=[-1.5, 1.5])
    figure.update_yaxes(title_text="RLoss at w + s · ν")
    pale, bold = {"color": _GREY, "width": 0.7}, {"color": BLUE, "width": 2.4}
    curves = [(curve, pale) for curve in np.delete(rise.curves, rise.typical, axis=0)]
    for curve, line in (*curves, (rise.curves[rise.typical], bold)):
        look = {"mode": "lines", "line": line, "hoverinfo": "skip"}
        figure.add_scatter(x=_digits(rise.steps), y=_digits(curve), **look)
    figure.add_scatter(
        x=[-1, 0, 1],
        y=[rise.before, low, high],
        mode="markers+text",
        text=["w − ν ", "w", " w + ν"],
        textposition=["middle left", "bottom center", "middle right"],
        marker={"size": 11, "color": BLUE},
        cliponaxis=False,
        hoverinfo="skip",
    )
    arrow: dict[str, Any] = {"xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": ""}
    arrow |= {"arrowcolor": ORANGE, "arrowwidth": 1.6, "arrowhead": 2, "arrowside": "end+start"}
    figure.add_annotation(x=1, y=high, ax=1, ay=low, **arrow)
    place = {"x": 1.05, "y": (low + high) / 2, "xanchor": "left", "showarrow": False}
    figure.add_annotation(text=f"+{high - low:.2f}", font={"color": ORANGE}, **place)
    figure.layout.meta = (
        f"The landscape of {method_label(run.method)}. The arrow is the rise of RLoss from w to "
        f"w + ν, {high - low:.2f}; its mean over {len(rise.curves)} directions ν is "
        f"{rise.mean:.2f}, the average-case flatness."
    )
    return figure


def y_axes(models: Models) -> tuple[str, ...]:
    """`Y_AXES`, and test errors by other attacks of AutoAttack than `standard`."""
    return (*Y_AXES, *errors_by_other_attacks(models.values["metric"]))


def hovers(figures: Figures) -> dict[str, str]:
    """Texts of hovers, by the `ids` of points."""
    names = dict.fromkeys((*X_AXES, *y_axes(figures.models), *GAPS, _CURVATURE))
    texts: dict[str, str] = {}
    for models, is_published in figures.sources:
        about = {label: _about(models, label) for label in models.labels}
        values = models.values[models.values["metric"].isin(names)]
        for (label, weights), rows in values.groupby(["label", "weights"], sort=False):
            measured = rows.set_index("metric")[["mean", "sd"]].T
            lines = [f"<b>{_plain(label)}</b>", *map(_plain, about[label])]
            for name in filter(measured.__contains__, names):
                mean, deviation = measured[name]
                text = metric(name).text
                spread = "" if math.isnan(deviation) else f" ± {text(deviation, 2)}"
                lines.append(f"{metric(name).title}: {text(mean, 2)}{spread}")
            lines += ["early-stopped weights"] if weights == "early_stopped" else []
            texts[_id(label, weights, is_published)] = "<br>".join(lines)
    return texts


def _about(models: Models, label: str) -> list[str]:
    """Lines of a hover: the runs and settings, or the published source."""
    if label not in models.runs:
        return [PUBLISHED, *models.frame.loc[label, ["source", "statistic"]]]

    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    runs, settings = models.runs[label], models.differs[label].items()
    names = [run.name for run in runs]
    names = names if len(names) <= 3 else [*names[:3], f"… ({len(names)} runs)"]
    lines = [", ".join(names)]
    lines += [f"diverged: {models.diverged(label)}"] if models.diverged(label) else []
    lines += [f"{name} = {short(value)}" for name, value in list(settings)[:_MOST_LINES]]
    if len(settings) > _MOST_LINES:
        lines.append(f"… ({len(settings)} settings differ)")
    eps = flat_settings(runs[0].settings).get("model.eps")
    seeds = ", ".join(str(run.seed) for run in runs if run.seed is not None)
    rest = [f"eps {short(eps)}"] if eps else []
    rest += [f"epochs {runs[0].epochs}", *([f"seeds {seeds}"] if seeds else [])]
    return [*lines, " · ".join(rest)]


def templates() -> dict[str, go.layout.Template]:
    """The colors of texts, grids and hovers on light and on dark pages."""
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
    made, clear = {}, "rgba(0,0,0,0)"
    for name, text, line, card in (
        ("light", "#1c2430", "#e3e7ed", "#ffffff"),
        ("dark", "#e4e7ec", "#2c3542", "#1a2029"),
    ):
        axis = {"gridcolor": line, "linecolor": line, "zeroline": False, "automargin": True}
        made[name] = go.layout.Template(
            layout={
                "font": {"family": font, "size": 13, "color": text},
                "paper_bgcolor": clear,
                "plot_bgcolor": clear,
                "xaxis": axis,
                "yaxis": axis,
                "hoverlabel": {"align": "left", "bgcolor": card, "font": {"color": text}},
                "modebar": {"bgcolor": clear, "color": _GREY, "activecolor": text},
            }
        )
    return made


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    legend = {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top", "font": {"size": 12}}
    layout: dict[str, Any] = {"margin": {"l": 52, "r": 14, "t": 14, "b": 46}, "legend": legend}
    for axis, name in (("xaxis", x), ("yaxis", y)):
        layout[axis] = {"title": {"text": metric(name).axis_label if name else "", "standoff": 10}}
        if name and metric(name).is_share:
            # Values are shares; the unit is in the title.
            layout[axis] |= {"tickformat": ".0%"}
    return {"template": "none", "hovermode": "closest", "showlegend": False, **layout, **more}


def _line(trace: Trace, hover: str = "") -> dict[str, Any]:
    """Arguments of `add_scatter` for a line, whose hover begins with its name."""
    color = trace.color if trace.method else _GREY
    arguments = {
        "x": _digits(trace.points.get("x", ())),
        "y": _digits(trace.points.get("y", ())),
        "mode": "lines",
        "line": {"color": color, "dash": trace.dash, "width": trace.width},
        "name": _name(trace),
        "showlegend": False,
        "meta": _meta(trace),
    }
    text = {"hovertemplate": f"<b>{_name(trace)}</b><br>{hover}<extra></extra>"} if hover else {}
    return arguments | text


def _marker(trace: Trace, size: int) -> dict[str, Any]:
    symbol, line = _SYMBOLS[trace.marker], {"width": 1, "color": "rgba(255,255,255,0.8)"}
    look: dict[str, Any] = {"symbol": symbol, "opacity": 0.95, "line": line}
    if trace.is_published:
        line = {"width": 1.2, "color": trace.color}
        look = {"symbol": f"{symbol}-open", "opacity": 0.5, "line": line}
    return {"size": size, "color": trace.color, **look}


def _name(trace: Trace) -> str:
    return _plain(trace.label) + (f", {PUBLISHED}" if trace.is_published else "")


def _plain(text: str) -> str:
    """A text for Plotly, which reads some tags and entities, but not `&quot;`."""
    return escape(text, quote=False)


def _meta(trace: Trace) -> dict[str, Any] | None:
    """Whose a trace is; None of a line of reference."""
    own = {"method": trace.method, "model": trace.model, "published": trace.is_published}
    return own if trace.method else None


def _id(label: str, weights: str, is_published: bool) -> str:
    return f"{'published' if is_published else 'run'}/{weights}/{label}"


def _digits(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _faded(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
