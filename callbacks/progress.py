"""Progress of the long measures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Lightning takes a task's number for its place in the list, so none of its tasks may move: the one
# added here is hidden between measures, not removed.
_TASKS: WeakKeyDictionary[Progress, TaskID] = WeakKeyDictionary()


@contextmanager
def measuring(trainer: Trainer, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar for a measure where the trainer shows Rich bars, and nothing elsewhere.

    Args:
        trainer: The trainer.
        what: Said beside the bar.
        total: Number of attacks to come on this rank.

    Yields:
        To be called after each attack.
    """
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar) or not bar.is_enabled or total == 0:
        yield lambda: None
        return
    # Only one live display may be on a terminal, so a running one of Lightning's is used.
    borrowed = bar.progress if bar.progress and bar.progress.live.is_started else None
    progress: Progress = borrowed or Progress(*_columns(), transient=True)
    if not borrowed:
        progress.start()
    if progress in _TASKS:
        progress.reset(_TASKS[progress], description=what, total=total, visible=True)
    else:
        _TASKS[progress] = progress.add_task(what, total=total)
    task = _TASKS[progress]
    try:
        yield lambda: progress.update(task, advance=1, refresh=True)
    finally:
        progress.update(task, visible=False, refresh=True)
        if not borrowed:
            progress.stop()


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
