"""How long the rest of a study takes, from the runs that have finished."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from robust_flatness.reporting.runs import read_runs
from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import State, epochs_done, state_of


@dataclass(frozen=True)
class Estimate:
    """Seconds an epoch of the finished runs, all their measures included.

    Attributes:
        by_method: The median of a method's runs.
        overall: The median over methods, for those that have none; NaN where nothing has finished.
    """

    by_method: dict[str, float]
    overall: float

    def seconds(self, runs: Sequence[PlannedRun]) -> float:
        """Seconds of what is left of some runs, one after another.

        Args:
            runs: Of a plan.
        """
        left = {run: run.epochs - epochs_done(run) for run in runs}
        return sum(
            epochs * self.by_method.get(run.method, self.overall)
            for run, epochs in left.items()
            if epochs
        )


def estimate(root: Path, data: str) -> Estimate:
    """Measures seconds an epoch on the runs below a folder.

    Args:
        root: With run folders; may not exist yet.
        data: Class of the data.
    """
    found: dict[str, list[float]] = {}
    for run in read_runs(root)[0] if root.is_dir() else []:
        seconds = run.wall_time_seconds / max(run.epochs, 1)
        if run.data == data and math.isfinite(seconds):
            found.setdefault(run.method, []).append(seconds)
    by_method = {method: statistics.median(values) for method, values in found.items()}
    return Estimate(by_method, statistics.median(by_method.values()) if by_method else math.nan)


def plan_table(plan: Sequence[PlannedRun], jobs: int) -> Table:
    """Says what a study has to do: runs by state, and how long the rest takes.

    Args:
        plan: All of its runs.
        jobs: Runs at once.
    """
    measured = estimate(plan[0].folder.parent, plan[0].data)
    table = Table(title=f"{len(plan)} runs on {plan[0].data}")
    table.add_column("method")
    for column in ("runs", *(state.value for state in State), "epochs", "s an epoch", "left"):
        table.add_column(column, justify="right")
    for method in dict.fromkeys(run.method for run in plan):
        runs = [run for run in plan if run.method == method]
        known = measured.by_method.get(method)
        table.add_row(
            method,
            *_counts(runs),
            str(sum(run.epochs for run in runs)),
            "–" if known is None else f"{known:.2f}",
            _duration(measured.seconds(runs)),
        )
    table.add_section()
    seconds = measured.seconds(plan) / jobs
    table.add_row("all", *_counts(plan), str(sum(run.epochs for run in plan)), "", "")
    table.caption = (
        "How long it takes is known once a run has finished."
        if math.isnan(seconds)
        else f"About {_duration(seconds)} for what is left, {jobs} at once; methods without a "
        "finished run count with the median of the others."
    )
    return table


def _counts(runs: Sequence[PlannedRun]) -> list[str]:
    states = [state_of(run) for run in runs]
    return [str(len(runs)), *(str(states.count(state)) for state in State)]


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
