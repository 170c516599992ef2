"""How long the rest of a study takes, from the runs that have finished."""

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from robust_flatness.reporting.runs import read_runs
from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import State, epochs_done, state_of


def seconds_left(plan: Sequence[PlannedRun]) -> dict[PlannedRun, float]:
    """Seconds that each run still takes, from those below the same root that have finished.

    An epoch counts with all of a run's measures, its last ones included: the median of runs that
    differ in their seed alone, else that over all others on the same data; NaN without any.

    Args:
        plan: Runs of one root.
    """
    root = plan[0].folder.parent
    measured = _seconds_an_epoch(root) if root.is_dir() else {}
    left = {}
    for run in plan:
        others = [value for (data, _, _), value in measured.items() if data == run.data]
        overall = statistics.median(others) if others else math.nan
        epochs = 0 if state_of(run) is State.FINISHED else run.epochs - epochs_done(run)
        known = measured.get((run.data, run.stem, run.epochs), overall)
        left[run] = epochs * known if epochs else 0.0
    return left


def schedule(seconds: Sequence[float], jobs: int) -> float:
    """Seconds that runs take in their order, each given to the first slot that is free.

    Example:
        >>> schedule([10, 10, 10], jobs=2), schedule([40], jobs=8)
        (20.0, 40.0)
    """
    slots = [0.0] * jobs
    for duration in seconds:
        heapq.heapreplace(slots, slots[0] + duration)
    return max(slots)


def plan_table(plan: Sequence[PlannedRun], jobs: int) -> Table:
    """Says what a study has to do: runs by state, and how long the rest takes.

    Args:
        plan: All of its runs.
        jobs: Runs at once.
    """
    left, states = seconds_left(plan), {run: state_of(run) for run in plan}
    table = Table(title=f"{len(plan)} runs on {', '.join(sorted({run.data for run in plan}))}")
    table.add_column("method", no_wrap=True)
    for column in ("runs", *(state.value for state in State), "epochs", "left"):
        table.add_column(column, justify="right")
    for stem in dict.fromkeys(run.stem for run in plan):
        runs = [run for run in plan if run.stem == stem]
        _add_row(table, stem.rsplit("-", 1)[0], runs, states, sum(left[run] for run in runs))
    table.add_section()
    total = schedule(list(left.values()), jobs)
    _add_row(table, "all", plan, states, total)
    table.caption = (
        "How long it takes is known once a run has finished."
        if math.isnan(total)
        else f"About {_duration(total)} with {jobs} at once, as long as the finished runs took "
        "an epoch with their measures; others count with the median of all."
    )
    return table


def _seconds_an_epoch(root: Path) -> dict[tuple[str, str, int], float]:
    """By data, name without the seed, and epochs."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for run in read_runs(root)[0]:
        seconds = run.wall_time_seconds / max(run.epochs, 1)
        if math.isfinite(seconds):
            stem = run.name.rsplit("-s", 1)[0]
            found.setdefault((run.data, stem, run.epochs), []).append(seconds)
    return {key: statistics.median(values) for key, values in found.items()}


def _add_row(
    table: Table,
    name: str,
    runs: Sequence[PlannedRun],
    states: Mapping[PlannedRun, State],
    seconds: float,
) -> None:
    own = [states[run] for run in runs]
    counts = [str(len(runs)), *(str(own.count(state)) for state in State)]
    table.add_row(name, *counts, str(sum(run.epochs for run in runs)), _duration(seconds))


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
