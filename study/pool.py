"""Trains a plan on this machine, several runs at a time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from queue import SimpleQueue
from threading import Event, Lock

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from robust_flatness.study.plan import PlannedRun, counted, print_plain
from robust_flatness.study.state import (
    Process,
    State,
    epochs_done,
    is_running,
    runs_here,
    start,
    state_of,
    study_file,
)

_POLL_SECONDS = 1.0
# A run that is terminated first finishes its batch, or its measure at the end of an epoch.
_PATIENCE_SECONDS = 60.0


class Pool:
    """Trains runs in processes of their own. A run that fails does not stop the others.

    Each run gets one of the devices, which are names as in `CUDA_VISIBLE_DEVICES`. Without any, the
    runs choose, and share the threads of the CPU. `failures` has the last line of the output of
    each run that failed, or the signal that ended it.
    """

    def __init__(
        self, jobs: int, devices: Sequence[str] = (), console: Console | None = None
    ) -> None:
        self.jobs, self.console = jobs, console or Console()
        self.failures: dict[PlannedRun, str] = {}
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        for number in range(jobs):
            gpu = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
            self._environments.put(gpu or {"OMP_NUM_THREADS": threads})
        self._running: dict[PlannedRun, Process | None] = {}
        self._finished: list[PlannedRun] = []
        self._stopping, self._lock = Event(), Lock()

    def run(self, plan: Sequence[PlannedRun]) -> None:
        """Trains the runs that have not finished, in the order of the plan.

        Runs that another process trains are waited for.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM, once all processes have ended.
        """
        self._total = len(plan)
        self._finished = [run for run in plan if state_of(run) is State.FINISHED]
        waiting = [run for run in plan if run not in self._finished]
        progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        bar = progress.add_task("", total=sum(run.epochs for run in plan))
        # SIGTERM ends the runs as Ctrl-C does.
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        executor = ThreadPoolExecutor(self.jobs)
        try:
            with progress:
                futures = {executor.submit(self._train, run) for run in waiting}
                while futures:
                    done, futures = wait(futures, _POLL_SECONDS, FIRST_COMPLETED)
                    again = [run for future in done if (run := future.result())]
                    futures |= {executor.submit(self._train, run) for run in again}
                    epochs = {run: epochs_done(run) for run in list(self._running)}
                    running = [f"{x.name} ({done}/{x.epochs})" for x, done in epochs.items()]
                    counts = f"{len(self._finished)} of {self._total} finished"
                    text = f"{counts}, {len(self.failures)} failed, running: {', '.join(running)}"
                    total = sum(run.epochs for run in self._finished) + sum(epochs.values())
                    progress.update(bar, completed=total, description=text)
        finally:
            self._terminate()
            executor.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, previous)

    def _train(self, run: PlannedRun) -> PlannedRun | None:
        """Trains a run. Returns it if it has to be tried again."""
        log = study_file(run, "log")
        log_size = log.stat().st_size if log.is_file() else 0
        environment = self._environments.get()
        try:
            with self._lock:
                if self._stopping.is_set():
                    return None
                process = self._running[run] = start(run, environment)
            if process is not None:
                process.wait()
            elif is_running(run) and not runs_here(run):
                # It uses no core or GPU of this machine, so the other runs come first.
                self._stopping.wait(_POLL_SECONDS)
            elif is_running(run):
                print_plain(self.console, f"waiting for {run.name}, which another process trains")
                while is_running(run) and not self._stopping.wait(_POLL_SECONDS):
                    pass
        finally:
            self._running.pop(run, None)
            self._environments.put(environment)
        if self._stopping.is_set():
            return None
        if state_of(run) is State.FINISHED:
            with self._lock:
                self._finished.append(run)
                print_plain(
                    self.console, f"finished {run.name} ({len(self._finished)} of {self._total})"
                )
        elif process is None:
            return run
        else:
            self.failures[run] = _reason(run, process.returncode, log_size)
            print_plain(self.console, f"failed {run.name}: {self.failures[run]}")
        return None

    def _terminate(self) -> None:
        """Ends all processes. No signal interrupts this."""
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with self._lock:
            self._stopping.set()
        processes = [process for process in list(self._running.values()) if process is not None]
        if processes:
            seconds = f"{_PATIENCE_SECONDS:.0f}"
            print_plain(
                self.console,
                f"Ending {counted(len(processes))}, which may take up to {seconds} s …",
            )
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        signal.signal(signal.SIGINT, interrupt)


def _reason(run: PlannedRun, code: int, log_size: int) -> str:
    """The last line of a run's output since its log had `log_size` bytes."""
    # A run that handles a signal exits with the status that shells report for it.
    number = code - 128 if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else -code
    if number > 0:
        return f"ended by signal {signal.Signals(number).name}"
    with study_file(run, "log").open("rb") as log:
        log.seek(log_size)
        lines = log.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1] if lines else f"ended with code {code}"
