"""What the HTML page shows, as one mapping for JSON: finite numbers, errors in percent.

Example:
    >>> data = page_data([])
    >>> data["models"], data["left_out"]
    ([], [])
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from robust_flatness.plotting.canvas import method_style
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.models import Model, Point, method_label
from robust_flatness.reporting.page_points import FIGURES, PagePoint, number
from robust_flatness.reporting.page_series import CURVES, curves, landscapes, paths
from robust_flatness.reporting.runs import LeftOut, Weights
from robust_flatness.reporting.scatter import PUBLISHED
from robust_flatness.reporting.settings import flat_settings
from robust_flatness.reporting.sweeps import find_sweeps
from robust_flatness.reporting.table1 import group_thresholds

Rows = Sequence[Mapping[str, float]]

_X = (
    "flatness/average/test",
    "flatness/worst/test",
    "flatness/average/train",
    "flatness/clean_average/test",
)
_Y = ("test/robust_loss", "test/robust_error", "test/autoattack_error")
_WEIGHTS: tuple[Weights, Weights] = ("final", "early_stopped")
_FLATNESS, _LOSS = _X[0], _Y[0]
# Title, horizontal axis, vertical axes of which the first that exists is taken, and what is drawn
# beside the points.
_VIEWS = (
    ("Early stopping: RLoss", _FLATNESS, (_LOSS,), "arrows"),
    ("Early stopping: RErr", _FLATNESS, (_Y[2], _Y[1]), "arrows"),
    ("RErr against RLoss, with the kink at guessing", _LOSS, (_Y[2], _Y[1]), "kink"),
    ("Hyper-parameters: a trend for each sweep", _FLATNESS, (_LOSS,), "trend"),
    ("Flatness on training against test images", _FLATNESS, (_X[2],), "diagonal"),
    ("Generalisation gap", _FLATNESS, ("gap/robust_loss",), ""),
    ("Last minus early-stopped RLoss", _FLATNESS, ("last_minus_best/robust_loss",), ""),
    ("RLoss against curvature", "hessian/max_eigenvalue", (_LOSS,), ""),
)
_COLUMNS: tuple[tuple[str, str, Weights], ...] = (
    ("RErr test, AutoAttack", "test/autoattack_error", "final"),
    ("RErr test, PGD", "test/robust_error", "final"),
    ("RErr train, AutoAttack", "train/autoattack_error", "final"),
    ("RErr train, PGD", "train_eval/robust_error", "final"),
    ("Average flatness", _FLATNESS, "final"),
    ("Worst flatness", _X[1], "final"),
    ("Early stopping RErr, AutoAttack", "test/autoattack_error", "early_stopped"),
    ("Early stopping RErr, PGD", "test/robust_error", "early_stopped"),
    ("RLoss test", _LOSS, "final"),
    ("Error test, clean", "test/error", "final"),
)
_MOST_LINES = 12  # of settings in a hover
_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}


def page_data(
    models: Sequence[Model],
    published: Sequence[Point] = (),
    trajectories: Mapping[str, Rows] | None = None,
    left_out: Sequence[LeftOut] = (),
) -> dict[str, Any]:
    """Collects what the page shows.

    Args:
        models: Of one data set.
        published: The paper's models.
        trajectories: The paper's trajectories by method, rows with `progress` in [0, 1] and
            figures by name, errors as shares.
        left_out: Folders that hold no usable run.

    Returns:
        Lists, mappings, strings and finite numbers; losses in nats, errors in percent.
    """
    trajectories = trajectories or {}
    ours = [PagePoint(model) for model in models]
    theirs = [PagePoint(point) for point in published]
    x, y = _measured(_X, ours or theirs), _measured(_Y, ours or theirs)
    views = _views(ours or theirs, has_sweep=bool(find_sweeps(models or published)))
    pairs = [*product(x, y), *((view["x"], view["y"]) for view in views)]
    return {
        "methods": _methods(models, published, trajectories),
        "models": [
            _model(model, point) | _place(model, models) for model, point in zip(models, ours)
        ],
        "published": [_published(point) for point in theirs],
        "names": {name: {"label": label, "unit": unit} for name, (label, unit) in FIGURES.items()},
        "x": x,
        "y": y,
        "views": views,
        "correlations": _correlations(pairs, ours, theirs),
        "guessing": [round(math.log(classes), 4) for classes in _num_classes(models)],
        "trajectories": paths(models, trajectories),
        "curve_kinds": [kind._asdict() for kind in CURVES],
        "landscapes": landscapes(models),
        "columns": [
            {"label": label, "name": name, "weights": weights, **_limits(name, weights, ours)}
            for label, name, weights in _COLUMNS
            if any(point.mean(name, weights) is not None for point in (*ours, *theirs))
        ],
        "unmeasured": [
            label
            for label, name, weights in _COLUMNS
            if models and all(point.mean(name, weights) is None for point in ours)
        ],
        # The page may travel; where the folders stood on this machine is nobody's business.
        "left_out": [
            {"folder": "/".join(folder.parts[-2:]), "reason": reason} for folder, reason in left_out
        ],
    }


def _limits(name: str, weights: Weights, points: Sequence[PagePoint]) -> dict[str, list[float]]:
    """Test errors that part good, average and poor models, as the paper groups its Table 1."""
    values = [value for point in points if (value := point.mean(name, weights)) is not None]
    grouped = name in _Y[1:] and weights == "final"
    thresholds = group_thresholds(values) if grouped else None
    return {"limits": [number(name, limit) for limit in thresholds]} if thresholds else {}


def _measured(names: Iterable[str], points: Sequence[PagePoint]) -> list[str]:
    return [name for name in names if any(point.mean(name) is not None for point in points)]


def _views(points: Sequence[PagePoint], *, has_sweep: bool) -> list[dict[str, str]]:
    views = []
    for title, x, choices, kind in _VIEWS:
        found = [y for y in choices if any(_has(point, x, y) for point in points)]
        if found and (kind != "trend" or has_sweep):
            views.append({"title": title, "x": x, "y": found[0], "kind": kind})
    return views


def _has(point: PagePoint, *names: str) -> bool:
    return all(point.mean(name) is not None for name in names)


def _methods(
    models: Iterable[Model], published: Iterable[Point], trajectories: Iterable[str]
) -> list[dict[str, Any]]:
    ours = list(dict.fromkeys(model.method for model in models))
    theirs = dict.fromkeys([*(point.method for point in published), *trajectories])
    return [_method(method, method in ours) for method in dict.fromkeys([*ours, *theirs])]


def _method(method: str, trained: bool) -> dict[str, Any]:
    style = method_style(method)
    look = {"colour": style.colour, "symbol": _SYMBOLS[style.marker]}
    return {"id": method, "label": method_label(method), "trained": trained, **look}


def _model(model: Model, point: PagePoint) -> dict[str, Any]:
    stopped = [run.early_stopped_epoch for run in model.runs if run.early_stopped_epoch is not None]
    return {
        "method": model.method,
        "label": model.label,
        "settings": model.untold,
        "about": _about(model),
        "num_seeds": len(model.runs),
        "figures": _figures(point),
        "curves": curves(model),
        "stopped": stopped,
    }


def _place(model: Model, models: Sequence[Model]) -> dict[str, int | None]:
    """Its number within its method, by which its lines are dashed, and that of its sweep."""
    same = [other.label for other in models if other.method == model.method]
    sweeps = [[step.point for step in sweep] for sweep in find_sweeps(models)]
    found = (index for index, sweep in enumerate(sweeps) if any(p is model for p in sweep))
    return {"rank": same.index(model.label), "sweep": next(found, None)}


def _published(point: PagePoint) -> dict[str, Any]:
    about = [text for text in (point.source, point.statistic) if text]
    return {
        "method": point.method,
        "label": point.label,
        "about": [PUBLISHED, *about],
        "figures": _figures(point),
    }


def _about(model: Model) -> list[str]:
    """Lines for the hover: its runs, its settings, its seeds."""
    names = [run.name for run in model.runs]
    shown = names if len(names) <= 3 else [*names[:3], f"… ({len(names)} runs)"]
    settings = flat_settings(model.runs[0].settings)
    always = {"eps": settings.get("model.eps"), "epochs": model.runs[0].epochs}
    always["seeds"] = ", ".join(str(run.seed) for run in model.runs if run.seed is not None)
    differs = [f"{name} = {_short(value)}" for name, value in model.differs.items()]
    if len(differs) > _MOST_LINES:
        differs = [*differs[:_MOST_LINES], f"… ({len(differs)} settings differ)"]
    rest = [f"{name} {_short(value)}" for name, value in always.items() if value not in (None, "")]
    diverged = [f"diverged: {model.diverged}"] if model.diverged else []
    return [", ".join(shown), *diverged, *differs, " · ".join(rest)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(point: PagePoint) -> dict[str, dict[str, list[float]]]:
    """By weights and name: the mean, and the deviation over seeds where there is one."""
    return {
        weights: {
            name: [number(name, value) for value in values if value is not None]
            for name in FIGURES
            if (values := (point.mean(name, weights), point.deviation(name, weights)))[0]
            is not None
        }
        for weights in _WEIGHTS
    }


def _correlations(
    pairs: Iterable[tuple[str, str]], ours: Sequence[PagePoint], theirs: Sequence[PagePoint]
) -> dict[str, dict[str, str]]:
    """By weights and `x y`, a line for our models and one for the published."""
    return {
        weights: {
            f"{x} {y}": text
            for x, y in dict.fromkeys(pairs)
            if (text := _correlation(x, y, weights, ours, theirs))
        }
        for weights in _WEIGHTS
    }


def _correlation(
    x: str, y: str, weights: Weights, ours: Sequence[PagePoint], theirs: Sequence[PagePoint]
) -> str:
    sentences = []
    for who, points in (("Your runs", ours), (_capital(PUBLISHED), theirs)):
        found = correlate(points, x, y, weights=weights)
        if found is not None:
            pearson = _with_interval(found.pearson, found.pearson_interval)
            spearman = _with_interval(found.spearman, found.spearman_interval)
            over = f"of {found.num_methods} methods, {found.over}"
            sentences.append(f"{who}: Pearson {pearson}, Spearman {spearman}; {over}.")
    return "\n".join(sentences)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    if not math.isfinite(value):
        return "–"
    if interval is None or not all(map(math.isfinite, interval)):
        return f"{value:.2f}"
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _num_classes(models: Iterable[Model]) -> list[int]:
    found = {run.num_classes for model in models for run in model.runs}
    return sorted(classes for classes in found if classes)
