"""One HTML page with interactive figures and the table, which needs no network.

Example:
    >>> import tempfile
    >>> from robust_flatness.reporting.frame import group_runs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_page(Path(folder) / "index.html", Figures(group_runs([])))
    ...     "Robust generalization" in path.read_text(encoding="utf-8")
    True
"""

import base64
import gzip
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from robust_flatness.plotting.landscape_figures import NAMES
from robust_flatness.reporting.figures import ERRORS, FLATNESS, Figures
from robust_flatness.reporting.frame import Models, natural_key
from robust_flatness.reporting.plotly_figures import X_AXES, hovers, page_figures, templates, y_axes
from robust_flatness.reporting.table1 import group_thresholds
from robust_flatness.run_folder.files import write_text
from robust_flatness.run_folder.metrics import (
    Metric,
    Weights,
    errors_by_other_attacks,
    is_by_other_attacks,
    method_label,
    metric,
)
from robust_flatness.run_folder.runs import LeftOut

_PACKAGES = ("robust-flatness", "torch", "lightning")
_COLUMNS: tuple[tuple[str, Weights], ...] = (
    ("test/autoattack_error", "final"),
    ("test/robust_error", "final"),
    ("train/autoattack_error", "final"),
    ("train_eval/robust_error", "final"),
    ("flatness/average/test", "final"),
    ("flatness/worst/test", "final"),
    ("test/autoattack_error", "early_stopped"),
    ("test/robust_error", "early_stopped"),
    ("test/robust_loss", "final"),
    ("test/error", "final"),
)
# SVG paths of markers in 12 x 12 pixels, for the list of methods and the table.
_MARKS = {
    "o": "M6 1.2a4.8 4.8 0 1 0 .01 0z",
    "s": "M1.7 1.7h8.6v8.6H1.7z",
    "^": "M6 1l5.2 9.4H.8z",
    "D": "M6 .6L11.4 6 6 11.4.6 6z",
    "v": "M6 11L.8 1.6h10.4z",
}
_KINDS = {**NAMES, "surface": "a plane"}
_WEIGHTS = {"final": "last weights", "early_stopped": "early-stopped weights"}
# Files of the report that a section of the page links to, if they were written.
_FILES = {
    "relation": ("flatness", "flatness-own", "worst-flatness", "error-flatness"),
    "paths": ("trajectories",),
    "curves": ("curves", "epochs"),
    "views": (
        *("early-stopping", "loss-and-error", "hyperparameters", "train-flatness", "gaps"),
        *("correlations", "correlations-early-stopped"),
    ),
    "landscapes": ("landscapes",),
    "schematic": ("schematic",),
}


def write_page(
    path: Path,
    figures: Figures,
    *,
    left_out: Sequence[LeftOut] = (),
    title: str = "Robust generalization and flat minima",
    files: Collection[str] = (),
) -> Path:
    """Writes the page atomically.

    It contains plotly.js, compressed, so that it opens without network: 2 MB instead of 5 MB, for
    browsers since 2023.

    Args:
        path: The HTML file.
        figures: Of models of one data set. There may be none.
        left_out: Folders that hold no usable run.
        title: The heading.
        files: Figures that are in `figures/` beside the page, for links to their PDF files; with
            any, the page also links to the tables.
    """
    models, published = figures.models, figures.published
    checks = figures.details.get("checks", pd.DataFrame()).to_dict("records")
    sections = page_figures(figures)
    methods = {
        method: {
            "id": method,
            "label": method_label(method),
            "is_own": method in models.methods,
            "color": style.color,
            "path": _MARKS[style.marker],
        }
        for method, style in figures.styles.items()
    }
    curves = [*sections["losses"].values(), *sections["errors"].values()]
    drawn = {
        t.meta["model"] for figure in curves for t in figure.data if t.meta and t.hovertemplate
    }
    able = [label for label in models.labels if label in drawn]
    usual = [label for label in able if models.frame.at[label, "method"] in ("at", "at_awp")]
    payload = {
        "figures": {
            section: {key: figure.to_plotly_json() for key, figure in drawn.items()}
            for section, drawn in sections.items()
        },
        "hovers": hovers(figures),
        "templates": {n: template.to_plotly_json() for n, template in templates().items()},
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        title=title,
        facts=_facts(models),
        methods=list(methods.values()),
        sections=sections,
        links={name: [f for f in wanted if f in files] for name, wanted in _FILES.items()},
        has_files=bool(files),
        x_axes=_options(X_AXES, sections["relation"], 0),
        y_axes=_options(y_axes(models), sections["relation"], 1),
        landscapes={name: _landscape_name(name) for name in sections["landscapes"]},
        curve_models=able,
        chosen=(usual or able)[:2],
        has_published=bool(len(published) or len(figures.trajectories)),
        guessing=list(figures.guessing.values()),
        **_table(models, published, methods),
        details=list(figures.details) if files else [],
        checks=sorted(
            (check for check in checks if check["passed"] is not True),
            key=lambda check: check["passed"] is None,
        ),
        num_checks=len(checks),
        # Parent folders on this machine are private.
        left_out=[("/".join(folder.parts[-2:]), reason) for folder, reason in left_out],
        plotly=_plotly(),
        payload=_compressed(
            json.dumps(payload, allow_nan=False, separators=(",", ":"), default=_plain)
        ),
    )
    write_text(path, page)
    return path


@lru_cache(maxsize=1)
def _plotly() -> str:
    return _compressed(get_plotlyjs())


def _compressed(text: str) -> str:
    # Without a time, so that equal runs give equal pages.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _plain(value: Any) -> Any:
    """Arrays and templates in figures as JSON types."""
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else value.tolist()


def _options(names: Iterable[str], drawn: Mapping[str, Any], part: int) -> dict[str, str]:
    """Titles of the metrics that a selector offers."""
    used = {key.split("|")[part] for key in drawn}
    return {name: metric(name).title for name in names if name in used}


def _landscape_name(key: str) -> str:
    name, _, label = key.partition("|")
    weights, _, kind = name.partition("/")
    text = f"{_KINDS.get(kind, kind)}, {_WEIGHTS.get(weights, weights)}"
    return f"{text}: {label}" if label else text


def _table(
    models: Models, published: Models, methods: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The rows of the table of all models, and its columns."""
    further = sorted(name for name in set(models.values["metric"]) if metric(name).in_tables)
    known = [*_COLUMNS, *((name, "final") for name in further)]
    known += [(name, "early_stopped") for name in further if is_by_other_attacks(name)]
    columns = [
        column for column in known if len(models.column(*column)) or len(published.column(*column))
    ]
    # Test errors between good, average and poor models, as in Table 1.
    limits = {
        (name, "final"): group_thresholds(models.column(name)["mean"].round(9).tolist())
        for name in ERRORS
    }
    rows = []
    for source in (models, published):
        is_published = source is published
        values = {column: source.column(*column) for column in columns}
        for label, method in source.frame["method"].items():
            row = {"label": label, "method": methods[method], "is_published": is_published}
            row["seeds"] = len(source.runs.get(str(label), ()))
            row["settings"] = source.settings(str(label)) if row["seeds"] else ""
            row["cells"] = [
                _cell(
                    metric(column[0]),
                    own["mean"].get(label, math.nan),
                    own["sd"].get(label, math.nan),
                    (not is_published and limits.get(column)) or (-math.inf, math.inf),
                )
                for column, own in values.items()
            ]
            rows.append(row)
    # By label until the script sorts them, so that the page reads well without it.
    rows.sort(key=lambda row: (row["is_published"], natural_key(str(row["label"]))))
    has = [len(models.column(*column)) > 0 for column in columns]
    return {
        "columns": [metric(f"{weights}/{name}").axis_label for name, weights in columns],
        "rows": rows,
        "sorted_by": has.index(True) if any(has) else -1,
        "unmeasured": [
            metric(f"{weights}/{name}").title
            for name, weights in _COLUMNS
            if len(models) and models.column(name, weights).empty
        ],
        "has_groups": any(limits.values()),
        "has_seeds": any(len(runs) > 1 for runs in models.runs.values()),
    }


def _cell(
    described: Metric, mean: float, deviation: float, limits: tuple[float, float]
) -> dict[str, Any]:
    if math.isnan(mean):
        return {"value": "", "text": "–", "spread": "", "group": ""}

    def text(value: float) -> str:
        if described.is_share:
            return f"{100 * value:.1f}"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"

    # A share of images, whose sum over seeds may be off by the last digit.
    share, (low, high) = round(mean, 9), limits
    return {
        "value": float(mean),
        "text": text(mean),
        "spread": "" if math.isnan(deviation) else f"± {text(deviation)}",
        "group": "good" if share < low else "poor" if share >= high else "",
    }


def _facts(models: Models) -> list[tuple[str, str]]:
    """What the page is about: names and texts, only of what is known."""
    runs = [run for own in models.runs.values() for run in own]
    if not runs:
        return [("Runs", "none that finished")]

    def span(values: Sequence[int]) -> str:
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low} to {high}"

    measured = {"PGD": ERRORS[1], "AutoAttack": ERRORS[0], "flatness": FLATNESS}
    others = errors_by_other_attacks(models.values["metric"])
    measured |= {label: name for name, label in others.items()}
    images = {
        label: [run.num_examples[name] for run in runs if name in run.num_examples]
        for label, name in measured.items()
    }
    hardware, versions = [], []
    for run in runs:
        cores = run.hardware.get("cpu_cores")
        cpu = f"{run.hardware.get('cpu') or 'CPU'}, {cores} cores" if cores else ""
        hardware.append(", ".join(map(str, run.hardware.get("gpus") or [])) or cpu)
        named = ((name, run.versions.get(name)) for name in _PACKAGES)
        versions.append(", ".join(f"{name} {version}" for name, version in named if version))
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    facts = {
        "Data": "; ".join(dict.fromkeys(run.data for run in runs)),
        "Runs": f"{len(runs)} ({len(models)} models, {len(models.methods)} methods)",
        "Seeds": ", ".join(map(str, seeds)),
        "Epochs": span([run.epochs for run in runs]),
        "Diverged": ", ".join(filter(None, map(models.diverged, models.labels))),
        "Test images": ", ".join(f"{span(n)} ({label})" for label, n in images.items() if n),
        "Hardware": "; ".join(dict.fromkeys(filter(None, hardware))),
        "Versions": "; ".join(dict.fromkeys(filter(None, versions))),
    }
    return [(name, text) for name, text in facts.items() if text]
