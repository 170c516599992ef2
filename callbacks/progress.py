"""Progress of the long measures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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
    task = progress.add_task(what, total=total)
    try:
        yield lambda: progress.update(task, advance=1, refresh=True)
    finally:
        progress.remove_task(task)
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
