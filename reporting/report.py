"""A folder of runs as tables, figures and one page."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.progress import track

from robust_flatness.reporting.correlation import Correlation, correlate
from robust_flatness.reporting.frame import Models, drop_duplicates, group_runs
from robust_flatness.reporting.landscape_figures import (
    landscapes_figure,
    schematic_figure,
    typical_direction,
)
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.panel_figures import (
    curves_figure,
    epochs_figure,
    trajectories_figure,
)
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.reporting.scatter_figures import (
    early_stopping_figure,
    flatness_figure,
    gap_figure,
    hyperparameter_figure,
    kink_figure,
    train_flatness_figure,
)
from robust_flatness.reporting.table1 import Table1, table1, write_table
from robust_flatness.run_folder.files import atomic_write
from robust_flatness.run_folder.runs import LeftOut, Run, find_runs

# Measures that the paper relates to robustness.
_FLATNESS = (
    "flatness/average/test",
    "flatness/worst/test",
    "flatness/average/train",
    "flatness/clean_average/test",
    "hessian/max_eigenvalue",
)
_ROBUSTNESS = ("test/robust_loss", "test/robust_error", "test/autoattack_error")


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        folder: Its folder; `index.html` is the page.
        data: Class of the data of its runs.
        models: Its models.
        left_out: Folders that are not in it, and why.
        figures: Names of its figures.
        table: Table 1.
        correlation: Of RLoss and average-case flatness over models, if they are enough.
    """

    folder: Path
    data: str
    models: Models
    left_out: Sequence[LeftOut]
    figures: Sequence[str]
    table: Table1
    correlation: Correlation | None


def write_report(
    runs: str | Path, folder: str | Path, *, data: str | None = None, published: bool = True
) -> Report:
    """Writes `index.html`, `table1.md/.csv/.tex`, `correlations.csv` and `figures/`.

    Args:
        runs: A folder that contains run folders at any depth.
        folder: The report's folder; files of an earlier report are replaced.
        data: Class of the data to report; by default that of most runs.
        published: Whether to show the paper's numbers as well.

    Raises:
        ValueError: If there is no finished run, or none on `data`.
    """
    folder = Path(folder)
    all_runs, left_out = find_runs(runs)
    selected, data, others = _on_data(all_runs, data, Path(runs), left_out)
    selected, duplicates = drop_duplicates(selected)
    left_out = [*left_out, *others, *duplicates]
    models = group_runs(selected)
    title = f"{len(models)} models on {data}"
    table = table1(models, published_models("table1") if published else None)
    write_table(table, folder)
    paper = published_models() if published else None
    paths = published_trajectories() if published else None
    _write_correlations(folder / "correlations.csv", models, paper)
    # The baseline, or else any model, for figures of one model.
    ordered = sorted(models.labels, key=lambda label: models.frame.at[label, "method"] != "at")
    example = next(
        (run for label in ordered if typical_direction(run := models.runs[label][0])), None
    )
    figures = _draw(models, paper, paths, title, ordered, example)
    names = _save(folder / "figures", figures)
    write_page(
        folder / "index.html",
        models=models,
        published=paper,
        trajectories=paths,
        left_out=left_out,
        title=f"Robust generalization and flat minima on {data}",
        files=names,
        schematic_run=example,
    )
    related = correlate(models, _FLATNESS[0], _ROBUSTNESS[0])
    return Report(folder, data, models, left_out, names, table, related)


def _on_data(
    runs: list[Run], data: str | None, root: Path, left_out: Sequence[LeftOut]
) -> tuple[list[Run], str, list[LeftOut]]:
    """Runs on one data set, and those on others, which do not compare."""
    if not runs:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise ValueError(
            f"Expected `runs` to hold a finished run but got {root}"
            f"{f', with {len(left_out)} folders left out ({reasons})' if left_out else ''}."
        )
    counts = Counter(run.data for run in runs)
    chosen = data or counts.most_common(1)[0][0]
    if chosen not in counts:
        raise ValueError(f"Expected `data` to be one of {', '.join(counts)} but got {chosen}.")
    others = [
        LeftOut(run.folder, f"is on {run.data}; `--data={run.data}` reports it")
        for run in runs
        if run.data != chosen
    ]
    return [run for run in runs if run.data == chosen], chosen, others


def _draw(
    models: Models,
    paper: Models | None,
    paths: pd.DataFrame | None,
    title: str,
    ordered: Sequence[str],
    example: Run | None,
) -> dict[str, Callable[[], Figure | None]]:
    """Functions that draw the figures, by file name."""
    figures: dict[str, Callable[[], Figure | None]] = {
        "flatness": lambda: flatness_figure(models, published=paper),
        "flatness-own": lambda: flatness_figure(models, title=title),
        "worst-flatness": lambda: flatness_figure(models, "flatness/worst/test", title=title),
        "error-flatness": lambda: flatness_figure(models, y="test/robust_error", title=title),
        "train-flatness": lambda: train_flatness_figure(models, title=title),
        "gaps": lambda: gap_figure(models, title=title),
        "early-stopping": lambda: early_stopping_figure(models, title=title),
        "hyperparameters": lambda: hyperparameter_figure(models, title=title),
        "curves": lambda: curves_figure(models, title=title),
        "landscapes": lambda: landscapes_figure(models, title=title),
        "trajectories": lambda: trajectories_figure(models, paths, title=title),
        "schematic": lambda: None if example is None else schematic_figure(example),
        "epochs": lambda: next(filter(None, (epochs_figure(models, o) for o in ordered)), None),
    }
    classes = models.runs[models.labels[0]][0].num_classes or 0
    if classes > 1:
        figures["loss-and-error"] = lambda: kink_figure(models, classes, title=title)
    return figures


def _save(folder: Path, figures: dict[str, Callable[[], Figure | None]]) -> list[str]:
    """Saves each figure as PNG and PDF, and removes old ones that are no longer drawn."""
    names = []
    for name, draw in track(figures.items(), "figures", transient=True):
        figure = draw()
        for kind in ("pdf", "png"):
            path = folder / f"{name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format=kind)
        names += [] if figure is None else [name]
    return names


def _write_correlations(path: Path, models: Models, paper: Models | None) -> None:
    """A row for each measured pair of flatness and robustness, of the runs and of the paper."""
    rows = []
    for x in _FLATNESS:
        for y in _ROBUSTNESS:
            for of, source in (("runs", models), ("paper, CIFAR-10", paper)):
                result = None if source is None else correlate(source, x, y)
                if result is not None:
                    pearson = result.pearson_interval or (None, None)
                    spearman = result.spearman_interval or (None, None)
                    numbers = (result.num_models, result.num_methods)
                    rows.append(
                        (x, y, of, result.pearson, *pearson, result.spearman, *spearman, *numbers)
                    )
    coefficients = [
        f"{name}{end}" for name in ("pearson", "spearman") for end in ("", "_low", "_high")
    ]
    frame = pd.DataFrame(rows, columns=["x", "y", "of", *coefficients, "models", "methods"])
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\r\n")
