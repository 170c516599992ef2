"""Starts one run of a study in a process of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import State, arguments_now, book_of, state_of

Process = subprocess.Popen[bytes]
PROGRAM = (sys.executable, "-m", "robust_flatness.cli")


def start(run: PlannedRun, environment: Mapping[str, str] | None = None) -> Process | None:
    """Starts or resumes a run, unless somebody else is at it.

    The process holds a lock as long as it lives, also where the study that started it was killed:
    no second process can then write to the same folder. It is a session of its own, so that Ctrl-C
    reaches the study alone, which ends its runs in order.

    Args:
        run: Of a plan.
        environment: Variables on top of those of this process.

    Returns:
        The process, or None where another one trains this run or has finished it meanwhile.

    Raises:
        ValueError: If files cannot be locked here.
    """
    lock = _locked(book_of(run, "lock"))
    if lock is None:
        return None
    try:
        if state_of(run) is State.FINISHED:
            return None
        command = [*PROGRAM, *arguments_now(run)]
        os.ftruncate(lock, 0)
        os.write(lock, socket.gethostname().encode())
        with book_of(run, "log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                # The lock belongs to whoever has the file open, which is then the run alone.
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)


def is_running(run: PlannedRun) -> bool:
    """Returns whether some process trains the run."""
    lock = _locked(book_of(run, "lock"))
    if lock is not None:
        os.close(lock)
    return lock is None


def runs_here(run: PlannedRun) -> bool:
    """Returns whether a process of this machine trains the run, or was the last to do so."""
    path = book_of(run, "lock")
    return path.is_file() and path.read_text() == socket.gethostname()


def _locked(path: Path) -> int | None:
    """An open file that nobody else has locked, else None."""
    try:
        import fcntl
    except ImportError as error:
        raise ValueError("Expected Linux or macOS for `study` but got Windows.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        raise ValueError(
            f"Expected `--root` to be on a file system with locks but got {path.parent}: {error}."
        ) from error
    return file
