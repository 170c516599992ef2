"""Progress of a run in one line, or in one line an epoch if the output is not a terminal."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column
from typing_extensions import override

from robust_flatness.loggers.epoch_csv import EpochCSVLogger

# Splits in the order of preference; fixed training images before training batches.
_SPLITS = {"train": ("train_eval", "train"), "test": ("test",), "val": ("val",)}
# The shortest times between two updates on a terminal, two lines of epochs, two lines of a measure.
_ON_TERMINAL, _EPOCHS, _MEASURES = 0.1, 2.0, 30.0


class LineProgressBar(ProgressBar):
    """Shows epoch, RLoss, RErr and the time left of training in one line of 80 columns.

    RLoss and RErr, on test images if these are measured, are those of the last epoch that measured
    anything, from the trainer's `EpochCSVLogger`. A measure shows its own progress in the same
    line. If the output is not a terminal, as in a log of SLURM, each epoch is a line with training
    and test images, at most one every two seconds; a measure is a line every 30 seconds.

    Args:
        console: Where to print; None is the standard output.

    Example:
        >>> epoch_text({"epoch": 3, "test/robust_loss": 1.514, "test/robust_error": 0.47})
        'test RLoss 1.51 RErr 47 %'
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console, self._enabled = console, True
        self._progress: Progress | None = None
        self._printed = -math.inf
        self._metrics, self._left = "", ""
        self._start = 0.0
        self._first_epoch, self._is_training = 0, False

    def __getstate__(self) -> dict[str, Any]:
        # Both hold locks, which processes that are spawned cannot take.
        return {**self.__dict__, "_console": None, "_progress": None}

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @contextmanager
    def measuring(self, text: str, total: int) -> Iterator[Callable[..., None]]:
        """Shows the progress of a measure, and yields the function that advances it."""
        begin, done = time.monotonic(), 0
        # One restart goes without saying, as the line is short.
        text = text.replace(" × 1 restarts", "")
        start = f"{self._epoch()}  {text}" if self._is_training else text

        def advance(count: int = 1) -> None:
            nonlocal done
            done += count
            taken = time.monotonic() - begin
            # In a log, only a measure that takes long has lines, and an epoch's line is kept.
            if self._is_terminal() or taken >= _MEASURES:
                left = taken / done * (total - done)
                self._show(f"{start}  {done}/{total}  {_duration(left)} left", _MEASURES)

        if self._is_terminal():
            self._show(f"{start}  0/{total}", _MEASURES, now=True)
        yield advance

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        self._first_epoch, self._is_training = trainer.current_epoch, True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now have all callbacks logged the epoch that ended.
        if trainer.current_epoch > self._first_epoch:
            self._end_epoch(trainer, trainer.current_epoch - 1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_terminal():
            batches = f"batch {batch_idx + 1}/{self.total_train_batches}"
            self._show("  ".join(filter(None, (self._epoch(), batches, self._metrics, self._left))))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > self._first_epoch:
            self._end_epoch(trainer, trainer.current_epoch - 1)
        self._is_training = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _end_epoch(self, trainer: Trainer, epoch: int) -> None:
        tables = (logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger))
        rows = next((table.rows for table in tables), [])
        texts = [text for row in reversed(rows) if (text := epoch_text(row))]
        if self._is_terminal():
            # Beside the batches there is room for one pair: the latest that is not of training.
            pairs = [text.split("  ")[-1] for text in texts]
            others = (pair for pair in pairs if not pair.startswith("train"))
            self._metrics = next(others, pairs[0] if pairs else "")
        else:
            self._metrics = epoch_text(rows[-1]) if rows and rows[-1]["epoch"] == epoch else ""
        epochs = trainer.max_epochs
        if epochs is not None and epochs > 0:
            pace = (time.monotonic() - self._start) / (epoch + 1 - self._first_epoch)
            self._left = f"{_duration(pace * (epochs - epoch - 1))} left"
        last = epoch + 1 == epochs or trainer.should_stop
        first = epoch == self._first_epoch
        if not self._is_terminal():
            parts = (self._epoch(epoch), self._metrics, self._left)
            self._show("  ".join(filter(None, parts)), _EPOCHS, now=last or first)

    def _epoch(self, epoch: int | None = None) -> str:
        epoch = self.trainer.current_epoch if epoch is None else epoch
        epochs = self.trainer.max_epochs
        # Counted from 0, as in `metrics.csv` and in the table at the end.
        return f"epoch {epoch}" + (f"/{epochs - 1}" if epochs is not None and epochs > 0 else "")

    def _is_terminal(self) -> bool:
        self._console = self._console or Console()
        return self._console.is_terminal

    def _show(self, text: str, seconds: float = _ON_TERMINAL, *, now: bool = False) -> None:
        terminal = self._is_terminal()
        since = time.monotonic() - self._printed
        if not self._enabled or (since < (_ON_TERMINAL if terminal else seconds) and not now):
            return
        self._printed = time.monotonic()
        if not terminal:
            print(text, file=self._console.file if self._console else None, flush=True)
            return
        if self._progress is None:
            line = TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            )
            self._progress = Progress(
                line, console=self._console, auto_refresh=False, transient=True
            )
            self._progress.start()
            self._progress.add_task("")
        self._progress.update(self._progress.task_ids[0], description=text, refresh=True)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def epoch_text(row: Mapping[str, float]) -> str:
    """RLoss and RErr of an epoch on training and test images, else on validation images."""
    texts: list[str] = []
    for label, prefixes in _SPLITS.items():
        prefix = next((p for p in prefixes if f"{p}/robust_loss" in row), None)
        if prefix is None or (label == "val" and len(texts) == 2):
            continue
        text, error = f"RLoss {row[f'{prefix}/robust_loss']:.2f}", row.get(f"{prefix}/robust_error")
        texts.append(f"{label} {text}" + ("" if error is None else f" RErr {100 * error:.0f} %"))
    return "  ".join(texts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
