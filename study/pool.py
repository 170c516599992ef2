"""Runs a plan on this machine, one after another or several at once."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from robust_flatness.study.launch import Process, start
from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import State, book_of, epochs_done, state_of

# Slots with the run that each is at, and its process.
Active = dict[int, tuple[PlannedRun, Process]]

_POLL_SECONDS = 1.0
# A run that is asked to end finishes its batch, and measures first where it is measuring.
_PATIENCE_SECONDS = 60.0
# Of argparse and of ours: the arguments were refused before anything was trained.
_REFUSED = 2


class Failure(NamedTuple):
    """A run that ended without results.

    Attributes:
        run: The run.
        reason: The last line that it said.
        refused: Whether its arguments were refused.
    """

    run: PlannedRun
    reason: str
    refused: bool


@dataclass
class Pool:
    """Trains runs, at most so many at once, and goes on past those that fail.

    Args:
        jobs: Runs at once.
        devices: GPUs by number; a run gets one of them. None are on the CPU, or take what there is.
        console: Where finished and failed runs are told.

    Attributes:
        failures: So far.
    """

    jobs: int
    devices: Sequence[int] = ()
    console: Console = field(default_factory=Console)
    failures: list[Failure] = field(default_factory=list)

    def run(self, plan: Sequence[PlannedRun]) -> None:
        """Trains what has not finished.

        Args:
            plan: Runs in their order. Those that another process trains are waited for.

        Raises:
            KeyboardInterrupt: After all processes were ended in order.
        """
        waiting = deque(run for run in plan if state_of(run) is not State.FINISHED)
        active: Active = {}
        # A study that is asked to end, ends its runs as it does for Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with self._progress() as progress:
            bars = {"all": progress.add_task("study", total=sum(run.epochs for run in plan))}
            try:
                while waiting or active:
                    self._collect(active, waiting)
                    self._fill(active, waiting)
                    self._show(progress, bars, plan, active)
                    time.sleep(_POLL_SECONDS)
            finally:
                signal.signal(signal.SIGTERM, before)
                _end([process for _, process in active.values()])

    def _fill(
        self,
        active: Active,
        waiting: deque[PlannedRun],
    ) -> None:
        """Gives free slots to runs that wait; one that is busy elsewhere goes to the end."""
        for slot in set(range(self.jobs)) - set(active):
            for _ in range(len(waiting)):
                run = waiting.popleft()
                process = start(run, self._environment(slot))
                if process is not None:
                    active[slot] = (run, process)
                    break
                if state_of(run) is not State.FINISHED:
                    waiting.append(run)

    def _collect(
        self,
        active: Active,
        waiting: deque[PlannedRun],
    ) -> None:
        for slot, (run, process) in list(active.items()):
            code = process.poll()
            if code is None:
                continue
            del active[slot]
            if code == 0 and state_of(run) is State.FINISHED:
                self.console.print(f"finished {run.name}")
                continue
            failure = Failure(run, _last_words(run, code), code == _REFUSED)
            self.console.print(f"[red]failed[/red] {run.name}: {failure.reason}", highlight=False)
            self.failures.append(failure)
            if failure.refused and self._refused_before(failure):
                # What was refused twice in the same words is wrong for all runs.
                waiting.clear()

    def _refused_before(self, failure: Failure) -> bool:
        return any(old.refused and old.reason == failure.reason for old in self.failures[:-1])

    def _environment(self, slot: int) -> dict[str, str]:
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": str(self.devices[slot % len(self.devices)])}
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TextColumn("epochs"), TimeElapsedColumn(), console=self.console)

    def _show(
        self,
        progress: Progress,
        bars: dict[str, TaskID],
        plan: Sequence[PlannedRun],
        active: Active,
    ) -> None:
        """Moves the bar of the study, and one of each run that is at work."""
        running = {run.name: run for run, _ in active.values()}
        for name in set(bars) - {"all", *running}:
            progress.remove_task(bars.pop(name))
        for name, run in running.items():
            if name not in bars:
                bars[name] = progress.add_task(f"  {name}", total=run.epochs)
            progress.update(bars[name], completed=epochs_done(run))
        progress.update(bars["all"], completed=sum(map(epochs_done, plan)))


def _last_words(run: PlannedRun, code: int) -> str:
    text = book_of(run, "log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return lines[-1] if lines else f"ended with code {code}"


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
