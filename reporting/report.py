"""A folder of runs as tables, figures and one page."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure
from rich.progress import track

from robust_flatness.reporting.copies import without_copies
from robust_flatness.reporting.correlation import Correlation, correlate
from robust_flatness.reporting.measure_figure import schematic_figure
from robust_flatness.reporting.method_landscapes import landscapes_figure
from robust_flatness.reporting.models import Model, Point, group_models
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.reporting.run_figures import curves_figure, epochs_figure
from robust_flatness.reporting.runs import LeftOut, Run, read_runs
from robust_flatness.reporting.study_figures import (
    early_stopping_figure,
    flatness_figure,
    gap_figure,
    kink_figure,
    train_flatness_figure,
)
from robust_flatness.reporting.sweep_figure import hyperparameter_figure
from robust_flatness.reporting.table1 import Table1, table1
from robust_flatness.reporting.table1_files import write_table
from robust_flatness.reporting.trajectory_figures import trajectories_figure
from robust_flatness.run_folder.atomic_write import whole_file

# What the paper relates, and what robust overfitting would be judged by instead.
_FLATNESS = (
    "flatness/average/test",
    "flatness/worst/test",
    "flatness/average/train",
    "flatness/clean_average/test",
    "hessian/max_eigenvalue",
)
_ROBUSTNESS = ("test/robust_loss", "test/robust_error", "test/autoattack_error")
_T = TypeVar("_T")
_MEASURED = "How average-case flatness is measured, drawn from the landscape of a run"


@dataclass(frozen=True)
class Report:
    """What a report was made of.

    Attributes:
        folder: Where it is; `index.html` is the page.
        data: Class of the data that its runs are on.
        models: In it.
        left_out: Folders that are not in it, and why.
        figures: Names of the figures.
        table: Table 1.
        correlation: Of RLoss and average-case flatness over models, if there are enough.
    """

    folder: Path
    data: str
    models: Sequence[Model]
    left_out: Sequence[LeftOut]
    figures: Sequence[str]
    table: Table1
    correlation: Correlation | None


def write_report(
    runs: str | Path, folder: str | Path, *, data: str | None = None, published: bool = True
) -> Report:
    """Writes `index.html`, `table1.md/.csv/.tex`, `correlations.csv` and `figures/`.

    Args:
        runs: A folder with run folders, at any depth.
        folder: Where the report goes; what an earlier one left there is replaced.
        data: Class of the data that is reported; by default that of most runs.
        published: Whether the paper's numbers stand beside those of the runs.

    Returns:
        What was written.

    Raises:
        ValueError: If there is no finished run, or none on `data`.
    """
    folder = Path(folder)
    found, left_out = read_runs(runs)
    found, data, others = _on_data(found, data, Path(runs), left_out)
    found, copies = without_copies(found)
    left_out = [*left_out, *others, *copies]
    models = group_models(found)
    table = table1(models, published_models("table1") if published else [])
    write_table(table, folder)
    paper = published_models() if published else []
    _write_correlations(folder / "correlations.csv", models, paper)
    images = dict(_save(folder / "figures", models, data, published))
    write_page(
        folder / "index.html",
        models=models,
        published=paper,
        trajectories=published_trajectories() if published else {},
        left_out=left_out,
        title=f"Robust generalization and flat minima on {data}",
        images={_MEASURED: images["schematic"]} if "schematic" in images else {},
    )
    related = correlate(models, _FLATNESS[0], _ROBUSTNESS[0])
    return Report(folder, data, models, left_out, list(images), table, related)


def _on_data(
    runs: list[Run], data: str | None, root: Path, left_out: Sequence[LeftOut]
) -> tuple[list[Run], str, list[LeftOut]]:
    """Runs on one data set, and those on others, as numbers of two data sets do not compare."""
    if not runs:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise ValueError(
            f"Expected `runs` to hold a finished run but got {root}"
            f"{f', where {len(left_out)} were left out ({reasons})' if left_out else ''}."
        )
    counts = Counter(run.data for run in runs)
    chosen = data or counts.most_common(1)[0][0]
    if chosen not in counts:
        raise ValueError(f"Expected `data` to be one of {', '.join(counts)} but got {chosen}.")
    others = [
        LeftOut(run.folder, f"is on {run.data}, which a report of its own shows")
        for run in runs
        if run.data != chosen
    ]
    return [run for run in runs if run.data == chosen], chosen, others


def _figures(
    models: Sequence[Model], data: str, published: bool
) -> dict[str, Callable[[], Figure | None]]:
    """How each figure is drawn, by its file's name."""
    paper: Sequence[Point] = published_models() if published else ()
    title, listed = f"{len(models)} models on {data}", list(models)
    figures: dict[str, Callable[[], Figure | None]] = {
        "flatness": lambda: flatness_figure(models, published=paper),
        "flatness-own": lambda: flatness_figure(models, title=title),
        "worst-flatness": lambda: flatness_figure(models, "flatness/worst/test", title=title),
        "error-flatness": lambda: flatness_figure(models, y="test/robust_error", title=title),
        "train-flatness": lambda: train_flatness_figure(models, title=title),
        "gaps": lambda: gap_figure(models, title=title),
        "early-stopping": lambda: early_stopping_figure(models, title=title),
        "hyperparameters": lambda: hyperparameter_figure(models, title=title),
        "curves": lambda: curves_figure(listed, title=title),
        "landscapes": lambda: landscapes_figure(listed, title=title),
        "trajectories": lambda: trajectories_figure(
            listed, published_trajectories() if published else None, title=title
        ),
        "schematic": lambda: _first(schematic_figure, (m.runs[0] for m in _baseline_first(models))),
        "epochs": lambda: _first(epochs_figure, _baseline_first(models)),
    }
    if (classes := models[0].runs[0].num_classes or 0) > 1:
        figures["loss-and-error"] = lambda: kink_figure(models, num_classes=classes, title=title)
    return figures


def _baseline_first(models: Sequence[Model]) -> list[Model]:
    return sorted(models, key=lambda model: model.method != "at")


def _first(draw: Callable[[_T], Figure | None], given: Iterable[_T]) -> Figure | None:
    """The figure of the first that can be drawn."""
    return next((figure for one in given if (figure := draw(one)) is not None), None)


def _save(
    folder: Path, models: Sequence[Model], data: str, published: bool
) -> Iterator[tuple[str, Path]]:
    """Draws and saves each figure as PNG and PDF; an old one that is no longer drawn is removed."""
    drawn = _figures(models, data, published)
    for name, draw in track(drawn.items(), "figures", transient=True):
        figure = draw()
        for kind in ("pdf", "png"):
            path = folder / f"{name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with whole_file(path) as beside:
                figure.savefig(beside, format=kind)
        if figure is not None:
            yield name, folder / f"{name}.png"


def _write_correlations(path: Path, models: Sequence[Point], paper: Sequence[Point]) -> None:
    """A row for each measured pair of flatness and robustness, of the runs and of the paper."""
    with whole_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        coefficients = ("pearson", "pearson_low", "pearson_high")
        ranks = ("spearman", "spearman_low", "spearman_high")
        table.writerow(["x", "y", "of", *coefficients, *ranks, "models", "methods"])
        for x in _FLATNESS:
            for y in _ROBUSTNESS:
                for name, points in (("runs", models), ("paper, CIFAR-10", paper)):
                    found = correlate(points, x, y)
                    if found is not None:
                        table.writerow([x, y, name, *_numbers(found)])


def _numbers(found: Correlation) -> list[float | str]:
    return [
        found.pearson,
        *(found.pearson_interval or ("", "")),
        found.spearman,
        *(found.spearman_interval or ("", "")),
        found.num_models,
        found.num_methods,
    ]
