"""Plotly figures of the HTML page. The page's script shows and hides their traces by `meta`.

Every trace of a model has `meta` with its `method`, its `model` (the label) and whether it is
`published`. Texts of hovers are stored once: the points of a trace have `ids`, which name them.
`layout.meta` is a sentence for the caption.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape as escape_html
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from robust_flatness.plotting.canvas import BLUE, ORANGE, MethodStyle, method_styles
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.frame import WEIGHTS, Models, flat_settings
from robust_flatness.reporting.landscape_figures import typical_direction
from robust_flatness.reporting.panel_figures import published_path, trajectory
from robust_flatness.reporting.scatter_figures import PUBLISHED, least_squares
from robust_flatness.reporting.sweeps import find_sweeps
from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import Weights, method_label, metric
from robust_flatness.run_folder.runs import Run

FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"
_CURVATURE = "hessian/max_eigenvalue"
ERRORS = ("test/autoattack_error", "test/robust_error")
X_AXES = (FLATNESS, "flatness/worst/test", "flatness/average/train", "flatness/clean_average/test")
Y_AXES = (LOSS, "test/robust_error", "test/autoattack_error")

_GREY = "#8A93A0"  # readable on light and on dark pages
# SVG paths of markers in 12 x 12 pixels, for the list of methods and the table.
MARKS = {
    "o": "M6 1.2a4.8 4.8 0 1 0 .01 0z",
    "s": "M1.7 1.7h8.6v8.6H1.7z",
    "^": "M6 1l5.2 9.4H.8z",
    "D": "M6 .6L11.4 6 6 11.4.6 6z",
    "v": "M6 11L.8 1.6h10.4z",
}
_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
# Models of one method share a colour; the later ones have other strokes and marks.
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")
_MARKS = ("", "circle", "square", "diamond", "cross", "x")
_MOST_LINES = 12  # of settings in a hover
_HIGHEST, _LOWEST = 15.0, 1e-3
_TICKS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 30, 100)


class _Curve(NamedTuple):
    name: str
    label: str
    dash: str
    width: float


_CURVES = {
    "losses": (
        _Curve("test/robust_loss", "test", "solid", 2.4),
        _Curve("train/robust_loss", "training batches", "dash", 1.6),
        _Curve("train_eval/robust_loss", "train", "longdashdot", 1.2),
        _Curve("test/robust_loss_correct", "test, correct when clean", "dot", 1.6),
        _Curve("test/robust_loss_incorrect", "test, incorrect when clean", "dashdot", 1.2),
    ),
    "errors": (
        _Curve("test/robust_error", "test", "solid", 2.4),
        _Curve("train/robust_error", "training batches", "dash", 1.6),
        _Curve("train_eval/robust_error", "train", "longdashdot", 1.2),
        _Curve("val/robust_error", "early-stopping images", "dot", 1.2),
    ),
}


class PageFigures:
    """The figures of a page.

    Args:
        models: Our models, of one data set.
        published: The paper's models.
        trajectories: The paper's trajectories, as `published_trajectories` returns them.
    """

    def __init__(self, models: Models, published: Models, trajectories: pd.DataFrame) -> None:
        self.models, self.published, self.trajectories = models, published, trajectories
        theirs = [*published.methods, *trajectories.get("method", ())]
        self.styles: Mapping[str, MethodStyle] = method_styles(models.methods, theirs)
        self._sources = ((published, True), (models, False))
        self._rank = {
            label: place
            for _, own in models.frame.groupby("method")
            for place, label in enumerate(own.index)
        }

    def scatters(self) -> dict[str, go.Figure]:
        """RLoss and RErr against flatness, by `x|y|weights`."""
        keys = itertools.product(X_AXES, Y_AXES, WEIGHTS)
        drawn = {"|".join(key): self.scatter(*key) for key in keys}
        return {key: figure for key, figure in drawn.items() if figure is not None}

    def scatter(self, x: str, y: str, weights: Weights = "final") -> go.Figure | None:
        """Models as points, or None if none of ours, or without ours none at all, has both."""
        source = self.models if len(self.models) else self.published
        if source.points(x, y, weights).empty:
            return None
        figure = go.Figure(layout=_layout(x, y))
        for models, is_published in self._sources:
            points = models.points(x, y, weights)
            for method, own in points.groupby("method", sort=False):
                style, name = self.styles[str(method)], _plain(method_label(str(method)))
                bar: dict[str, Any] = {"type": "data", "color": _faded(style.colour, 0.35)}
                bar |= {"thickness": 1, "width": 0}
                figure.add_scatter(
                    x=_digits(own["x"]),
                    y=_digits(own["y"]),
                    error_x={**bar, "array": _digits(own["dx"]), "visible": bool(own["dx"].any())},
                    error_y={**bar, "array": _digits(own["dy"]), "visible": bool(own["dy"].any())},
                    ids=[_id(label, weights, is_published) for label in own.index],
                    mode="markers",
                    name=f"{name}, {PUBLISHED}" if is_published else name,
                    marker=_marker(style, is_published, 7 if is_published else 11),
                    hovertemplate="%{text}<extra></extra>",
                    meta=_meta(str(method), None, is_published),
                )
        sentences = [
            f"{who}: {result.text}; of {result.num_methods} methods, {result.over}."
            for who, models in (
                ("Your runs", self.models),
                ("Published (CIFAR-10)", self.published),
            )
            if (result := correlate(models, x, y, weights=weights)) is not None
        ]
        too_few = "Measured for too few models for a correlation."
        figure.layout.meta = " ".join(sentences) or too_few
        return figure

    def views(self) -> dict[str, go.Figure]:
        """Other relations between metrics, by title."""
        error = next((e for e in ERRORS if len(self.models.column(e))), ERRORS[0])
        drawn = {
            "Early stopping: RLoss": self._arrows(FLATNESS, LOSS),
            "Early stopping: RErr": self._arrows(FLATNESS, error),
            "RErr against RLoss, with the loss of guessing": self._kink(LOSS, error),
            "Hyper-parameters: a trend for each sweep": self._trends(FLATNESS, LOSS),
            "Flatness on training against test images": self._diagonal(
                FLATNESS, "flatness/average/train"
            ),
            "Generalization gap": self.scatter(FLATNESS, "gap/robust_loss"),
            "Last minus early-stopped RLoss": self.scatter(FLATNESS, "last_minus_best/robust_loss"),
            "RLoss against curvature": self.scatter(_CURVATURE, LOSS),
        }
        return {title: figure for title, figure in drawn.items() if figure is not None}

    def paths(self) -> go.Figure | None:
        """Trajectories through the plane of flatness and RLoss; `customdata` is the progress."""
        paths = [
            (method, method_label(method), True, published_path(self.trajectories, method))
            for method in dict.fromkeys(self.trajectories.get("method", ()))
        ]
        paths += [
            (method, label, False, trajectory(self.models, label))
            for label, method in self.models.frame["method"].items()
        ]
        paths = [path for path in paths if len(path[3])]
        if not paths:
            return None
        figure = go.Figure(layout=_layout(FLATNESS, LOSS))
        alpha = 0.3 if len(paths) > 8 else 0.6
        for method, label, is_published, path in paths:
            style = self.styles[method]
            look = {"color": _faded(style.colour, alpha), "width": 1.3}
            look["dash"] = "dot" if is_published else self._dash(label)
            name = f"{_plain(label)}{f', {PUBLISHED}' if is_published else ''}"
            figure.add_scatter(
                x=_digits(path["x"]),
                y=_digits(path["y"]),
                customdata=_digits(path["share"]),
                mode="lines+markers",
                line=look,
                marker=_marker(style, is_published, 3),
                opacity=0.5 if is_published else 1,
                name=name,
                hovertemplate=f"<b>{name}</b><br>%{{customdata:.0%}} of training<br>"
                "average-case flatness: %{x:.2f}<br>RLoss: %{y:.2f}<extra></extra>",
                meta=_meta(method, label, is_published),
            )
        # The ranges of the whole training, so that the axes stand still.
        for axis, get in ((figure.layout.xaxis, "x"), (figure.layout.yaxis, "y")):
            values = pd.concat([path[get] for *_, path in paths])
            ends = [path[get].iloc[-1] for *_, path in paths]
            low, high = min(values.quantile(0.02), *ends), max(values.quantile(0.98), *ends)
            room = 0.08 * ((high - low) or 1)
            axis.range = [low - room, high + room]
        return figure

    def curves(self, panel: str) -> go.Figure | None:
        """`losses` or `errors` over epochs, of all models; the script chooses among them."""
        kinds = _CURVES[panel]
        figure = go.Figure(layout=_layout("", kinds[0].name, showlegend=True))
        figure.layout.update(xaxis_title_text="epoch", uirevision="curves")
        label = "RErr, in %" if panel == "errors" else "RLoss"
        figure.update_yaxes(title_text=label, rangemode="tozero")
        drawn: list[go.Scatter] = []
        for kind in kinds:
            own = list(self._curve(kind, ".1%" if panel == "errors" else ".2f"))
            if own:
                line = {"color": _GREY, "dash": kind.dash, "width": kind.width}
                look = {"name": kind.label, "legendgroup": kind.name, "mode": "lines"}
                figure.add_scatter(x=[None], y=[None], line=line, **look)
            drawn += own
        if not drawn:
            return None
        figure.add_traces(drawn)
        top = max(max(trace.y) for trace in drawn)
        for model, runs in self.models.runs.items():
            stops = [r.early_stopped_epoch for r in runs if r.early_stopped_epoch is not None]
            figure.add_scatter(
                # A gap between the lines of seeds.
                x=[x for stop in stops for x in (stop, stop, None)],
                y=[0, top, None] * len(stops),
                mode="lines",
                line=self._line(model, "dashdot", 1),
                hoverinfo="skip",
                showlegend=False,
                meta=_meta(self.models.frame.at[model, "method"], model),
            )
        if panel == "losses":
            for loss in self.guessing:
                figure.add_hline(loss, line={"color": _GREY, "width": 1.2, "dash": "dot"})
        return figure

    def landscapes(self) -> dict[str, go.Figure]:
        """Losses along directions by name, and surfaces by `name|model`."""
        names = {n for runs in self.models.runs.values() for run in runs for n in run.landscapes}
        # The last weights and random directions come first.
        order = sorted(names, key=lambda n: (n[:5] != "final", not n.endswith("random"), n))
        figures: dict[str, go.Figure | None] = {}
        for name in order:
            if name.endswith("surface"):
                for label in self.models.labels:
                    figures[f"{name}|{label}"] = self._surface(name, label)
            else:
                figures[name] = self._landscape(name)
        return {name: figure for name, figure in figures.items() if figure is not None}

    @property
    def guessing(self) -> list[float]:
        """The losses of guessing, ln K."""
        classes = {run.num_classes for runs in self.models.runs.values() for run in runs}
        return [math.log(number) for number in sorted(filter(None, classes))]

    def hovers(self) -> dict[str, str]:
        """Texts of hovers, by the `ids` of points."""
        names = dict.fromkeys(
            (*X_AXES, *Y_AXES, "gap/robust_loss", "last_minus_best/robust_loss", _CURVATURE)
        )
        texts: dict[str, str] = {}
        for models, is_published in self._sources:
            about = {label: self._about(models, label) for label in models.labels}
            values = models.values[models.values["metric"].isin(names)]
            for (label, weights), rows in values.groupby(["label", "weights"], sort=False):
                by_name = rows.set_index("metric")
                measured = [n for n in names if n in by_name.index]
                lines = [f"<b>{_plain(label)}</b>", *map(_plain, about[label])]
                lines += [_value(n, by_name.at[n, "mean"], by_name.at[n, "sd"]) for n in measured]
                lines += ["early-stopped weights"] if weights == "early_stopped" else []
                texts[_id(label, weights, is_published)] = "<br>".join(lines)
        return texts

    def _arrows(self, x: str, y: str) -> go.Figure | None:
        figure = self.scatter(x, y)
        if figure is None:
            return None
        has_arrow = False
        for models, is_published in self._sources:
            last, best = models.points(x, y), models.points(x, y, "early_stopped")
            both = last[last.index.isin(best.index)]
            for method, starts in both.groupby("method", sort=False):
                ends, size = best.loc[starts.index], len(starts)
                colour = _faded(self.styles[str(method)].colour, 0.35 if is_published else 0.75)
                ids = [_id(label, "early_stopped", is_published) for label in starts.index]
                # Each arrow is two points, and a gap before the next one.
                x_places, y_places = (
                    list(itertools.chain(*zip(_digits(starts[a]), _digits(ends[a]), [None] * size)))
                    for a in "xy"
                )
                figure.add_scatter(
                    x=x_places,
                    y=y_places,
                    ids=list(itertools.chain(*(("", name, "") for name in ids))),
                    mode="lines+markers",
                    line={"color": colour, "width": 1 if is_published else 1.5},
                    marker={
                        "symbol": "arrow",
                        "angleref": "previous",
                        "size": [0, 9, 0] * size,
                        "color": colour,
                        "line": {"width": 0},
                    },
                    hovertemplate="%{text}<extra></extra>",
                    meta=_meta(str(method), None, is_published),
                )
                has_arrow |= not is_published or not len(self.models)
        _add_note(figure, "An arrow points from the last to the early-stopped weights of a model.")
        return figure if has_arrow else None

    def _kink(self, x: str, y: str) -> go.Figure | None:
        figure = self.scatter(x, y)
        if figure is None or not self.guessing:
            return figure
        line = {"color": _GREY, "width": 1.2, "dash": "dash"}
        for loss in self.guessing:
            text = f" guessing ({loss:.2f})"
            figure.add_vline(loss, line=line, annotation={"text": text, "font_color": _GREY})
        points, edge = self.models.points(x, y), self.guessing[0]
        for side in (points[points["x"] <= edge], points[points["x"] > edge]):
            if (trend := _trend(side)) is not None:
                figure.add_trace(trend)
        _add_note(
            figure,
            "Dotted: least-squares lines of all your models on both sides of the loss of guessing, "
            "if three are there.",
        )
        return figure

    def _trends(self, x: str, y: str) -> go.Figure | None:
        figure = self.scatter(x, y)
        source = self.models if len(self.models) else self.published
        if figure is None or not find_sweeps(source):
            return None
        for models, is_published in self._sources:
            points = models.points(x, y)
            for sweep in find_sweeps(models):
                own = points[points.index.isin(list(sweep))]
                if len(own) and (trend := _trend(own)) is not None:
                    method = str(own["method"].iloc[0])
                    trend.line.color = self.styles[method].colour
                    trend.meta = _meta(method, None, is_published)
                    figure.add_trace(trend)
        _add_note(
            figure,
            "Dotted: the least-squares line of each sweep of three models or more, which differ in "
            "one number of their training alone.",
        )
        return figure

    def _diagonal(self, x: str, y: str) -> go.Figure | None:
        figure = self.scatter(x, y)
        if figure is not None:
            values = [v for trace in figure.data for v in (*trace.x, *trace.y)]
            low, high = min(values), max(values)
            line = {"color": _GREY, "width": 1.2, "dash": "dot"}
            figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)
            _add_note(figure, "Dotted: equal on both.")
        return figure

    def _curve(self, kind: _Curve, number: str) -> Iterator[go.Scatter]:
        for label, runs in self.models.runs.items():
            series = self.models.series(label, kind.name)
            if series is None:
                continue
            total = max(run.epochs for run in runs)
            mark = _MARKS[self._rank[label] % len(_MARKS)]
            yield go.Scatter(
                x=[round(share * total) - 1 for share in series["share"]],
                y=_digits(series["mean"]),
                mode="lines+markers" if mark else "lines",
                marker={"symbol": mark or "circle", "size": 7, "maxdisplayed": 6},
                line=self._line(label, kind.dash, kind.width),
                legendgroup=kind.name,
                showlegend=False,
                name=_plain(label),
                hovertemplate=f"<b>{_plain(label)}</b><br>{kind.label}: %{{y:{number}}}<br>"
                "epoch %{x}<extra></extra>",
                meta=_meta(self.models.frame.at[label, "method"], label),
            )

    def _landscape(self, name: str) -> go.Figure | None:
        figure = go.Figure(layout=_layout("", LOSS, showlegend=True))
        figure.layout.xaxis.title.text = "step along the direction"
        highest, lowest = 0.0, _HIGHEST
        for label, runs in self.models.runs.items():
            seeds = [run.landscapes[name] for run in runs if name in run.landscapes]
            if not seeds:
                continue
            steps = seeds[0].coordinates
            same = [seed for seed in seeds if np.array_equal(seed.coordinates, steps)]
            curves = np.concatenate([seed.curves for seed in same])
            kept = np.isfinite(curves).all(axis=0)
            if not kept.any():
                continue
            curves = np.maximum(curves[:, kept], _LOWEST)
            drawn = curves.max(axis=0) if name.endswith("adversarial") else curves.mean(axis=0)
            highest, lowest = max(highest, curves.max()), min(lowest, curves.min())
            method = self.models.frame.at[label, "method"]
            colour = self.styles[method].colour
            common: dict[str, Any] = {"x": _digits(steps[kept]), "mode": "lines"}
            common |= {"legendgroup": label, "meta": _meta(method, label)}
            edge = {"hoverinfo": "skip", "showlegend": False, "line": {"width": 0, "color": colour}}
            name_and_error = _plain(label) + self._error(label, name)
            figure.add_scatter(**common, **edge, y=_digits(curves.min(axis=0)))
            fill = {"fill": "tonexty", "fillcolor": _faded(colour, 0.12)}
            figure.add_scatter(**common, **edge, **fill, y=_digits(curves.max(axis=0)))
            figure.add_scatter(
                **common,
                y=_digits(drawn),
                name=name_and_error,
                line=self._line(label, self._dash(label), 2),
                hovertemplate=f"<b>{name_and_error}</b><br>step %{{x:.2f}}: "
                "RLoss %{y:.3g}<extra></extra>",
            )
        if not figure.data:
            return None
        high = 1.1 * min(highest, _HIGHEST) if lowest < _HIGHEST else 1.1 * highest
        figure.update_yaxes(
            type="log",
            title_text="RLoss (logarithmic)",
            tickvals=_TICKS,
            range=[math.log10(lowest / 1.1), math.log10(high)],
        )
        return figure

    def _surface(self, name: str, label: str) -> go.Figure | None:
        seeds = [run.landscapes[name] for run in self.models.runs[label] if name in run.landscapes]
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
            meta=_meta(self.models.frame.at[label, "method"], label),
        )
        return figure

    def _about(self, models: Models, label: str) -> list[str]:
        """Lines of a hover: the runs and settings, or the published source."""
        if label not in models.runs:
            return [PUBLISHED, *models.frame.loc[label, ["source", "statistic"]]]
        runs, settings = models.runs[label], models.differs[label].items()
        names = [run.name for run in runs]
        names = names if len(names) <= 3 else [*names[:3], f"… ({len(names)} runs)"]
        lines = [", ".join(names)]
        lines += [f"diverged: {models.diverged(label)}"] if models.diverged(label) else []
        lines += [f"{name} = {_short(value)}" for name, value in list(settings)[:_MOST_LINES]]
        if len(settings) > _MOST_LINES:
            lines.append(f"… ({len(settings)} settings differ)")
        eps = flat_settings(runs[0].settings).get("model.eps")
        seeds = ", ".join(str(run.seed) for run in runs if run.seed is not None)
        rest = [f"eps {_short(eps)}"] if eps else []
        rest += [f"epochs {runs[0].epochs}", *([f"seeds {seeds}"] if seeds else [])]
        return [*lines, " · ".join(rest)]

    def _dash(self, label: str) -> str:
        return _DASHES[self._rank[label] % len(_DASHES)]

    def _line(self, label: str, dash: str, width: float) -> dict[str, Any]:
        colour = self.styles[self.models.frame.at[label, "method"]].colour
        return {"color": colour, "dash": dash, "width": width}

    def _error(self, label: str, name: str) -> str:
        """RErr of the same weights, for the legend of a landscape."""
        weights: Weights = "early_stopped" if name.startswith("early_stopped") else "final"
        errors = (self.models.mean(label, error, weights) for error in ERRORS)
        error = next((error for error in errors if error is not None), None)
        return "" if error is None else f", RErr {100 * error:.1f} %"


def schematic(run: Run) -> go.Figure | None:
    """What average-case flatness measures, drawn from a run's own landscape; None without one."""
    measure = typical_direction(run)
    if measure is None:
        return None
    steps, curves, typical, (left, low, high), flatness = measure
    figure = go.Figure(layout=_layout("", ""))
    figure.update_xaxes(
        title_text="step s along a direction ν, ‖ν‖ = ξ‖w‖",
        tickvals=[-1, 0, 1],
        range=[-1.5, 1.5],
    )
    figure.update_yaxes(title_text="RLoss at w + s · ν")
    for index in [*(i for i in range(len(curves)) if i != typical), typical]:
        line = {"color": BLUE, "width": 2.4} if index == typical else {"color": _GREY, "width": 0.7}
        figure.add_scatter(
            x=_digits(steps), y=_digits(curves[index]), mode="lines", line=line, hoverinfo="skip"
        )
    figure.add_scatter(
        x=[-1, 0, 1],
        y=[left, low, high],
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
        f"w + ν, {high - low:.2f}; its mean over {len(curves)} directions ν is {flatness:.2f}, the "
        "average-case flatness."
    )
    return figure


def templates() -> dict[str, go.layout.Template]:
    """The colours of texts, grids and hovers on light and on dark pages."""
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
    made = {}
    for name, text, line, card in (
        ("light", "#1c2430", "#e3e7ed", "#ffffff"),
        ("dark", "#e4e7ec", "#2c3542", "#1a2029"),
    ):
        axis = {"gridcolor": line, "linecolor": line, "zeroline": False, "automargin": True}
        clear = "rgba(0,0,0,0)"
        hover = {"align": "left", "bgcolor": card, "font": {"color": text}}
        layout = {
            "font": {"family": font, "size": 13, "color": text},
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": hover,
            "modebar": {"bgcolor": clear, "color": _GREY, "activecolor": text},
        }
        made[name] = go.layout.Template(layout=layout)
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


def _marker(style: MethodStyle, is_published: bool, size: int) -> dict[str, Any]:
    symbol = _SYMBOLS[style.marker]
    if is_published:
        line = {"width": 1.2, "color": style.colour}
        look = {"symbol": f"{symbol}-open", "opacity": 0.5}
    else:
        line = {"width": 1, "color": "rgba(255,255,255,0.8)"}
        look = {"symbol": symbol, "opacity": 0.95}
    return {"size": size, "color": style.colour, "line": line, **look}


def _trend(points: pd.DataFrame) -> go.Scatter | None:
    """The least-squares line between the ends of three points or more."""
    if (line := least_squares(points)) is None:
        return None
    look = {"color": _GREY, "width": 1.2, "dash": "dot"}
    ends, values = map(_digits, line)
    return go.Scatter(x=ends, y=values, mode="lines", line=look, hoverinfo="skip")


def _add_note(figure: go.Figure, text: str) -> None:
    figure.layout.meta = f"{text} {figure.layout.meta}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """A text for Plotly, which reads some tags and entities, but not `&quot;`."""
    return escape_html(text, quote=False)


def _meta(method: str, model: str | None = None, is_published: bool = False) -> dict[str, Any]:
    return {"method": method, "model": model, "published": is_published}


def _id(label: str, weights: str, is_published: bool) -> str:
    return f"{'published' if is_published else 'run'}/{weights}/{label}"


def _value(name: str, mean: float, deviation: float) -> str:
    described = metric(name)
    spread = "" if math.isnan(deviation) else f" ± {described.text(deviation, 2)}"
    return f"{described.title}: {described.text(mean, 2)}{spread}"


def _digits(values: Sequence[float] | pd.Series | Array) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
