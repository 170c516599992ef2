"""A folder of runs as tables, figures and one page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from robust_flatness.reporting.correlation import Correlation, correlate
from robust_flatness.reporting.figures import ERRORS, FLATNESS, GAPS, LOSS, Figures
from robust_flatness.reporting.frame import Models, drop_duplicates, group_runs
from robust_flatness.reporting.matplotlib_figures import (
    correlations_figure,
    curves_figure,
    epochs_figure,
    landscapes_figure,
    relation_figure,
    schematic_figure,
    sweeps_figure,
    trajectories_figure,
)
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.reporting.table1 import Table1, table1, write_table
from robust_flatness.run_folder.files import atomic_write
from robust_flatness.run_folder.runs import LeftOut, find_runs


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        folder: Its folder; `index.html` is the page.
        data: Data set of its runs, see `Run.data`.
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
    runs: str | Path,
    folder: str | Path,
    *,
    data: str | None = None,
    published: bool = True,
    further: Sequence[str | Path] = (),
) -> Report:
    """Writes `index.html`, `table1.md/.csv/.tex`, `correlations.csv` and `figures/`.

    If runs have them, also `checks.csv`, `error_curve.csv` and `class_errors.csv`.

    Args:
        runs: A folder that contains run folders at any depth.
        folder: The report's folder; files of an earlier report are replaced.
        data: Data set to report, see `Run.data`; by default that of most runs.
        published: Whether to show the paper's numbers as well.
        further: More folders like `runs`.

    Raises:
        ValueError: If there is no finished run, or none on `data`.
    """
    folder, (all_runs, left_out) = Path(folder), find_runs(runs)
    for other in further:
        more_runs, more_left_out = find_runs(other)
        all_runs, left_out = [*all_runs, *more_runs], [*left_out, *more_left_out]
    if not all_runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        raise ValueError(
            f"Expected `runs` to hold a finished run but got {runs}"
            f"{f', with {len(left_out)} folders left out ({reasons})' if left_out else ''}."
        )
    counts = Counter(run.data for run in all_runs)
    chosen = data or counts.most_common(1)[0][0]
    if chosen not in counts:
        raise ValueError(f"Expected `data` to be one of {', '.join(counts)} but got {chosen}.")
    selected, duplicates = drop_duplicates([run for run in all_runs if run.data == chosen])
    left_out += [
        LeftOut(run.folder, f"is on {run.data}; `--data={run.data}` reports it")
        for run in all_runs
        if run.data != chosen
    ]
    left_out += duplicates
    models = group_runs(selected)
    table = table1(models, published_models("table1") if published else None)
    write_table(table, folder)
    paper = published_models() if published else None
    figures = Figures(models, paper, published_trajectories() if published else None)
    tables = {"correlations": figures.correlations, **figures.details}
    for name in ("correlations", "checks", "error_curve", "class_errors"):
        path = folder / f"{name}.csv"
        if name not in tables:
            path.unlink(missing_ok=True)
            continue
        with atomic_write(path) as temporary:
            tables[name].to_csv(temporary, index=False, lineterminator="\r\n")
    names = _save(folder / "figures", figures, chosen)
    write_page(
        folder / "index.html",
        figures,
        left_out=left_out,
        title=f"Robust generalization and flat minima on {chosen}",
        files=names,
    )
    related = correlate(models, FLATNESS, LOSS)
    return Report(folder, chosen, models, left_out, names, table, related)


def _save(folder: Path, figures: Figures, data: str) -> list[str]:
    """Saves each figure as PNG and PDF, and removes old ones that are no longer drawn."""
    models, title = figures.models, f"{len(figures.models)} models on {data}"
    relation = figures.relation
    draw = {
        "flatness": lambda: relation_figure(relation(FLATNESS, LOSS), published=True, heading=True),
        "flatness-own": lambda: relation_figure(
            relation(FLATNESS, LOSS), title=title, heading=True
        ),
        "worst-flatness": lambda: relation_figure(
            relation("flatness/worst/test", LOSS), title=title, heading=True
        ),
        "error-flatness": lambda: relation_figure(
            relation(FLATNESS, ERRORS[1]), title=title, heading=True
        ),
        "correlations": lambda: correlations_figure(figures, title=f"{title}, last weights"),
        "correlations-early-stopped": lambda: correlations_figure(
            figures, "early_stopped", title=f"{title}, early-stopped weights"
        ),
        "train-flatness": lambda: relation_figure(figures.train_flatness(), title=title),
        "gaps": lambda: relation_figure(*(relation(FLATNESS, gap) for gap in GAPS), title=title),
        "early-stopping": lambda: relation_figure(figures.early_stopping(), title=title),
        "hyperparameters": lambda: sweeps_figure(figures, title=title),
        "curves": lambda: curves_figure(models, title=title),
        "landscapes": lambda: landscapes_figure(figures, title=title),
        "trajectories": lambda: trajectories_figure(figures, title=title),
        "schematic": lambda: schematic_figure(figures.example),
        "epochs": lambda: next(
            filter(None, (epochs_figure(models, label) for label in figures.baseline_first)), None
        ),
        "loss-and-error": lambda: (
            relation_figure(figures.kink(ERRORS[1]), title=title) if figures.guessing else None
        ),
    }
    names = []
    for name, function in track(draw.items(), "figures", transient=True):
        figure = function()
        for kind in ("pdf", "png"):
            path = folder / f"{name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format=kind)
        names += [] if figure is None else [name]
    return names
