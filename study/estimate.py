"""How long the rest of a study takes, from the runs that have finished."""

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from robust_flatness.run_folder.runs import Run, find_runs
from robust_flatness.study.plan import PlannedRun, counted, stem_of
from robust_flatness.study.state import State, epochs_done, state_of


class _Pace(NamedTuple):
    """Seconds that a run takes.

    Attributes:
        epoch: For one epoch, with what is measured in it.
        end: For what it measures at its end.
    """

    epoch: float
    end: float


def seconds_left(plan: Sequence[PlannedRun]) -> dict[PlannedRun, float]:
    """Seconds that each run still takes, from those below the same root that have finished.

    Epochs and what a run measures at its end count apart: the median of runs that differ in their
    seed or length alone, else that over all others on the same data; NaN without any.

    Args:
        plan: Runs of one root.
    """
    return _seconds_left({run: state_of(run) for run in plan})


def _seconds_left(states: Mapping[PlannedRun, State]) -> dict[PlannedRun, float]:
    root = next(iter(states)).folder.parent
    if all(state is State.FINISHED for state in states.values()):
        return dict.fromkeys(states, 0.0)
    measured = _paces(root) if root.is_dir() else {}
    left = {}
    for run, state in states.items():
        others = [pace for (data, _), pace in measured.items() if data == run.data]
        pace = measured.get((run.data, run.stem)) or _median(others)
        # What is recorded of a run that starts anew is repeated.
        epochs = run.epochs - (epochs_done(run) if state is State.CUT_OFF else 0)
        # Until there are results, something is still to do.
        rest = max(epochs * pace.epoch + pace.end, pace.epoch)
        left[run] = 0.0 if state is State.FINISHED else rest
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
    states = {run: state_of(run) for run in plan}
    left = _seconds_left(states)
    data = ", ".join(sorted({run.data for run in plan}))
    table = Table(title=escape(f"{counted(len(plan))} on {data}"))
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
        "for an epoch and for the measures at their end; others count with the median of all."
    )
    return table


def _paces(root: Path) -> dict[tuple[str, str], _Pace]:
    """By data, and name without the seed."""
    found: dict[tuple[str, str], list[_Pace]] = {}
    for run in find_runs(root)[0]:
        if math.isfinite(run.wall_time_seconds) and run.epochs > 0:
            found.setdefault((run.data, stem_of(run.name)), []).append(_pace(run))
    return {key: _median(paces) for key, paces in found.items()}


def _pace(run: Run) -> _Pace:
    """Of a finished run, whose last checkpoint tells when its epochs were over."""
    path = run.folder / "checkpoints" / "last.ckpt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        seconds = float(content["callbacks"]["Results"]["wall_time_seconds"])
        whole = content["epoch"] + 1 == run.epochs
    except Exception:
        # Without a checkpoint, or with one of other versions, the end counts with the epochs.
        whole = False
    seconds = seconds if whole else run.wall_time_seconds
    return _Pace(seconds / run.epochs, max(0.0, run.wall_time_seconds - seconds))


def _median(paces: Sequence[_Pace]) -> _Pace:
    if not paces:
        return _Pace(math.nan, math.nan)
    return _Pace(*(statistics.median(values) for values in zip(*paces)))


def _add_row(
    table: Table,
    name: str,
    runs: Sequence[PlannedRun],
    states: Mapping[PlannedRun, State],
    seconds: float,
) -> None:
    own = [states[run] for run in runs]
    counts = [str(len(runs)), *(str(own.count(state)) for state in State)]
    table.add_row(escape(name), *counts, str(sum(run.epochs for run in runs)), _duration(seconds))


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
