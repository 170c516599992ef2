"""The bars of a study: one of all its epochs, and one of each run at work."""

from collections.abc import Collection, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import epochs_done


class StudyProgress:
    """Shows how far a study is; reads the folders of runs at work alone.

    Args:
        plan: All runs.
        waiting: Those that have not finished.
        console: Where it is shown; only where that is a terminal.
    """

    def __init__(
        self, plan: Sequence[PlannedRun], waiting: Collection[PlannedRun], console: Console
    ) -> None:
        left = set(waiting)
        self.total = len(plan)
        self._finished = self.total - len(left)
        self._done = {run: epochs_done(run) if run in left else run.epochs for run in plan}
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        self._bars = Progress(*columns, TextColumn("epochs"), TimeElapsedColumn(), console=console)
        self._all = self._bars.add_task("study", total=sum(run.epochs for run in plan))
        self._tasks: dict[PlannedRun, TaskID] = {}

    def __enter__(self) -> "StudyProgress":
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def finish(self, run: PlannedRun) -> int:
        """Counts a run as finished, and returns how many are."""
        self._done[run] = run.epochs
        self._finished += 1
        return self._finished

    def show(self, active: Sequence[PlannedRun]) -> None:
        """Moves the bars.

        Args:
            active: Runs at work.
        """
        for run in set(self._tasks) - set(active):
            self._bars.remove_task(self._tasks.pop(run))
        for run in active:
            self._done[run] = epochs_done(run)
            if run not in self._tasks:
                self._tasks[run] = self._bars.add_task(f"  {run.name}", total=run.epochs)
            measuring = ", measuring its end" if self._done[run] == run.epochs else ""
            self._bars.update(
                self._tasks[run],
                completed=self._done[run],
                description=f"  {run.name}{measuring}",
            )
        self._bars.update(self._all, completed=sum(self._done.values()))
