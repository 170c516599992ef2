"""Runs that are interrupted: their exit status, and what resumes them."""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

# Statuses of processes that a signal ended, as shells report them.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


@contextmanager
def sigterm_exits(*, at_once: bool) -> Iterator[None]:
    """Has SIGTERM raise `SystemExit(143)`, so that whatever is open is closed in order.

    While Lightning trains, it ends training after the batch instead.

    Args:
        at_once: Whether to raise even then.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        # Lightning's handler calls this one behind its own.
        if at_once or signal.getsignal(signal.SIGTERM) is end:
            raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted_status(error: BaseException) -> int | None:
    """Returns the exit status if a signal ended the run, else None.

    Args:
        error: What ended it.

    Example:
        >>> interrupted_status(KeyboardInterrupt()), interrupted_status(ValueError())
        (130, None)
    """
    # Lightning turns Ctrl-C into an exit with status 1, and SIGTERM into one with status 0.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SIGTERMException):
        return TERMINATED
    return TERMINATED if isinstance(error, SystemExit) and error.code == TERMINATED else None


def resume_command(folder: Path) -> str | None:
    """Returns what resumes a run, in the form that this process was started in, or None.

    Args:
        folder: The run folder.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return None
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = sys.argv[0] or "cli.py"
    program = [Path(script).name]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif script.endswith(".py"):
        program = ["python", script]
    if last.is_relative_to(Path.cwd()):
        last = last.relative_to(Path.cwd())
    return shlex.join([*program, "fit", "--ckpt_path", str(last)])
