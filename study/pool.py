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

from robust_flatness.study.launch import Process, is_running, runs_here, start
from robust_flatness.study.plan import PlannedRun, counted
from robust_flatness.study.progress import StudyProgress
from robust_flatness.study.state import State, book_of, state_of

_POLL_SECONDS = 1.0
# A run that is asked to end finishes its batch, and its measure where it is measuring.
_PATIENCE_SECONDS = 60.0


class Failure(NamedTuple):
    """A run that ended without results.

    Attributes:
        run: The run.
        reason: The last line that it said.
    """

    run: PlannedRun
    reason: str


class _Slot(NamedTuple):
    """A run at work; without a process where a study that is no more started it."""

    run: PlannedRun
    process: Process | None
    log_size: int


@dataclass
class Pool:
    """Trains runs, at most so many at once, and goes on past those that fail.

    Args:
        jobs: Runs at once.
        devices: Names of GPUs, as in `CUDA_VISIBLE_DEVICES`; a run gets one of them. Without any, a
            run has the CPU, or takes what there is.
        console: Where finished and failed runs are told.

    Attributes:
        failures: So far.
    """

    jobs: int
    devices: Sequence[str] = ()
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
        active: dict[int, _Slot] = {}
        # A study that is asked to end, ends its runs as it does for Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with StudyProgress(plan, waiting, self.console) as progress:
                while waiting or active:
                    self._collect(active, waiting, progress)
                    self._fill(active, waiting)
                    progress.show([slot.run for slot in active.values()])
                    time.sleep(_POLL_SECONDS)
        finally:
            self._end([slot.process for slot in active.values() if slot.process])
            signal.signal(signal.SIGTERM, before)

    def _fill(self, active: dict[int, _Slot], waiting: deque[PlannedRun]) -> None:
        """Gives free slots to runs that wait; one that is busy elsewhere goes to the end."""
        for number in set(range(self.jobs)) - set(active):
            for _ in range(len(waiting)):
                run = waiting.popleft()
                log = book_of(run, "log")
                size = log.stat().st_size if log.is_file() else 0
                process = start(run, self._environment(number))
                if process is not None:
                    active[number] = _Slot(run, process, size)
                    break
                if is_running(run) and runs_here(run):
                    # It has cores or a GPU of this machine, so it takes a slot.
                    self._say(f"waiting for {run.name}, which another process trains")
                    active[number] = _Slot(run, None, size)
                    break
                if state_of(run) is not State.FINISHED:
                    waiting.append(run)

    def _collect(
        self, active: dict[int, _Slot], waiting: deque[PlannedRun], progress: StudyProgress
    ) -> None:
        for number, (run, process, log_size) in list(active.items()):
            if is_running(run) if process is None else process.poll() is None:
                continue
            del active[number]
            if state_of(run) is State.FINISHED:
                self._say(f"finished {run.name} ({progress.finish(run)} of {progress.total})")
            elif process is None:
                waiting.append(run)
            else:
                failure = Failure(run, _last_words(run, process.returncode, log_size))
                self._say(f"failed {run.name}: {failure.reason}")
                self.failures.append(failure)

    def _environment(self, number: int) -> dict[str, str]:
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": self.devices[number % len(self.devices)]}
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}

    def _say(self, text: str) -> None:
        # Names and errors may hold brackets, which are no markup.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end(self, processes: Sequence[Process]) -> None:
        """Asks processes to end, and waits for them; nothing stops it half-way."""
        left = [process for process in processes if process.poll() is None]
        if not left:
            return
        seconds = f"{_PATIENCE_SECONDS:.0f}"
        self._say(f"Ending {counted(len(left))}, which may take up to {seconds} s …")
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in left:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        signal.signal(signal.SIGINT, ignored)


def _last_words(run: PlannedRun, code: int, log_size: int) -> str:
    """The last line of what a run said since its log had a size."""
    # A run that is interrupted ends in order, with the status that shells give it.
    number = code - 128 if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else -code
    if number > 0:
        return f"ended by signal {signal.Signals(number).name}"
    with book_of(run, "log").open("rb") as log:
        log.seek(log_size)
        text = log.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with code {code}"
