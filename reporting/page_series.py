"""Lines of the page: curves over epochs, ways through the plane, landscapes.

Example:
    >>> end = {"progress": 1.0, "flatness/average/test": 1.2, "test/robust_loss": 4.0}
    >>> paths([], {"at": [end]})
    [{'progress': [1.0], 'x': [1.2], 'y': [4.0], 'method': 'at', 'label': 'AT', 'published': True}]
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_flatness.reporting.models import Model, method_label
from robust_flatness.reporting.page_points import number
from robust_flatness.reporting.series import model_series
from robust_flatness.run_folder.landscape_file import Array, Landscape

Rows = Sequence[Mapping[str, float]]
_FLATNESS, _LOSS = "flatness/average/test", "test/robust_loss"


class CurveKind(NamedTuple):
    """A figure over epochs.

    Attributes:
        name: Of the figure.
        label: In the legend.
        panel: Axis that it is drawn on.
        dash: Plotly's name of a line style.
        width: In pixels.
    """

    name: str
    label: str
    panel: str
    dash: str
    width: float


# As in the paper's figure of robust overfitting.
CURVES = (
    CurveKind("test/robust_loss", "test", "RLoss", "solid", 2.4),
    CurveKind("train/robust_loss", "train", "RLoss", "dash", 1.6),
    CurveKind("train_eval/robust_loss", "train, weights fixed", "RLoss", "longdashdot", 1.2),
    CurveKind("test/robust_loss_correct", "test, correct when clean", "RLoss", "dot", 1.6),
    CurveKind("test/robust_loss_incorrect", "test, incorrect when clean", "RLoss", "dashdot", 1.2),
    CurveKind("test/robust_error", "test", "RErr", "solid", 2.4),
    CurveKind("train/robust_error", "train", "RErr", "dash", 1.6),
    CurveKind("train_eval/robust_error", "train, weights fixed", "RErr", "longdashdot", 1.2),
    CurveKind("val/robust_error", "early-stopping images", "RErr", "dot", 1.2),
)


def curves(model: Model) -> dict[str, dict[str, list[float]]]:
    """Figures over epochs by name, the mean over seeds.

    Args:
        model: Its runs' trajectories are read.
    """
    total = max(run.epochs for run in model.runs)
    found = {kind.name: model_series(model, kind.name) for kind in CURVES}
    return {
        name: {
            "epoch": [round(share * total) - 1 for share in series.shares],
            "value": [number(name, value) for value in series.mean],
        }
        for name, series in found.items()
        if series
    }


def paths(models: Iterable[Model], published: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Ways through the plane of flatness and RLoss, of those that have both.

    Args:
        models: Whose trajectories are read.
        published: Rows with `progress` and figures, by method.
    """
    ours = [
        {**_path(_rows(model)), "method": model.method, "label": model.label, "published": False}
        for model in models
    ]
    theirs = [
        {**_path(rows), "method": method, "label": method_label(method), "published": True}
        for method, rows in published.items()
    ]
    return [path for path in (*ours, *theirs) if path["progress"]]


def _rows(model: Model) -> list[dict[str, float]]:
    rows: dict[float, dict[str, float]] = {}
    for name in (_FLATNESS, _LOSS):
        series = model_series(model, name)
        for share, value in zip(series.shares, series.mean) if series else ():
            rows.setdefault(share, {"progress": share})[name] = value
    return [rows[share] for share in sorted(rows)]


def _path(rows: Rows) -> dict[str, list[float]]:
    names = {"progress": "progress", "x": _FLATNESS, "y": _LOSS}
    whole = [row for row in rows if all(map(math.isfinite, _values(row, names.values())))]
    return {key: [number(name, row[name]) for row in whole] for key, name in names.items()}


def _values(row: Mapping[str, float], names: Iterable[str]) -> list[float]:
    return [row.get(name, math.nan) for name in names]


def landscapes(models: Iterable[Model]) -> dict[str, list[dict[str, Any]]]:
    """By name, those of the last weights first, what is drawn for each model that has it.

    Args:
        models: Whose run folders are read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        for name, seeds in _by_name(model).items():
            drawn = _surface(seeds[0]) if name.endswith("surface") else _lines(name, seeds)
            if drawn:
                about = {"method": model.method, "label": model.label}
                found.setdefault(name, []).append({**about, **drawn})
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[bool, bool, str]:
    """The last weights before others, and random directions first."""
    return not name.startswith("final"), not name.endswith("random"), name


def _by_name(model: Model) -> dict[str, list[Landscape]]:
    by_name: dict[str, list[Landscape]] = {}
    for run in model.runs:
        for name, landscape in run.landscapes().items():
            by_name.setdefault(name, []).append(landscape)
    return by_name


def _lines(name: str, seeds: Sequence[Landscape]) -> dict[str, list[float]]:
    """Over the directions of all seeds: the mean, of adversarial ones the highest, and the band."""
    steps = seeds[0].coordinates
    same = [seed for seed in seeds if np.array_equal(seed.coordinates, steps)]
    curves = np.concatenate([seed.losses.mean(axis=2) for seed in same])
    kept = np.isfinite(curves).all(axis=0)
    if not kept.any():
        return {}
    curves = curves[:, kept]
    line = curves.max(axis=0) if name.endswith("adversarial") else curves.mean(axis=0)
    band = {"low": curves.min(axis=0), "high": curves.max(axis=0)}
    drawn = {"step": steps[kept], "line": line, **band}
    return {key: _numbers(values) for key, values in drawn.items()}


def _surface(landscape: Landscape) -> dict[str, Any]:
    losses = landscape.losses.mean(axis=2)
    if not np.isfinite(losses).all():
        return {}
    # Plotly wants rows along the vertical axis; the first direction is the horizontal one.
    grid = [_numbers(row) for row in losses.T]
    return {"step": _numbers(landscape.coordinates), "grid": grid}


def _numbers(values: Array) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
