"""A table of a run with one row for each epoch, which is complete after a kill and a resume.

Lightning's own `CSVLogger` writes the validation and the training metrics of an epoch to two rows,
and deletes the file if a run is resumed.

Example:
    >>> from robust_flatness.loggers.epoch_csv import EpochCSVLogger
    >>> logger = EpochCSVLogger(None)
    >>> logger.log_metrics({"val/robust_error": 0.5, "epoch": 0})
    >>> logger.log_metrics({"train/robust_loss": 1.5, "epoch": 0})
    >>> logger.rows
    [{'epoch': 0, 'train/robust_loss': 1.5, 'val/robust_error': 0.5}]
"""

import csv
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from robust_flatness.run_folder.files import atomic_write


class EpochCSVLogger(Logger):
    """Writes one row for each epoch to `<folder>/metrics.csv`.

    The column `epoch` comes first, the others follow in alphabetical order. A table that exists is
    read, so that a resumed run continues it. `Trajectory` calls `truncate` and `refill` when a run
    starts or resumes; a project without it can call them itself. Only rank 0 keeps and writes rows.

    Args:
        folder: The run folder, which is created. With `None`, rows are kept in memory only.
        write: Whether to read and write the file. If not, `folder` is only the `save_dir`.

    Attributes:
        recording: Whether `log_metrics` keeps metrics. `Trajectory` sets it to False outside `fit`,
            because Lightning counts epochs from 0 there.

    Raises:
        ValueError: If the folder cannot be created or written to, or if its `metrics.csv` is not a
            table of this class.
    """

    name = ""
    # Empty, so that checkpoints are saved in `<folder>/checkpoints`.
    version = ""

    def __init__(self, folder: str | Path | None, *, write: bool = True) -> None:
        super().__init__()
        self.recording = True
        self._save_dir = None if folder is None else str(folder)
        self._path = Path(folder) / "metrics.csv" if folder is not None and write else None
        self._rows: dict[int, dict[str, float]] = {}
        self._held = False
        self._open()

    @property
    def save_dir(self) -> str | None:
        """The run folder."""
        return self._save_dir

    log_dir = save_dir

    @property
    def experiment(self) -> DummyExperiment:
        """Accepts any call and does nothing, for modules that call `self.logger.experiment`."""
        return DummyExperiment()

    @property
    def rows(self) -> list[dict[str, float]]:
        """A copy of the rows, sorted by epoch: `epoch`, then the metrics by name."""
        rows = sorted(self._rows.items())
        return [{"epoch": epoch} | dict(sorted(metrics.items())) for epoch, metrics in rows]

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics to the row of their `epoch`. Without it, nothing is kept.

        Values that are not numbers, such as images, are left to other loggers.
        """
        if self.recording and "epoch" in metrics and (numbers := _numbers(metrics)):
            self._rows.setdefault(int(metrics["epoch"]), {}).update(numbers)
            self._write()

    @override
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing, because the run folder has a `config.yaml`."""

    @rank_zero_only
    def refill(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Adds epochs and metrics that are missing. Existing values do not change."""
        for row in rows:
            epoch = int(row["epoch"])
            self._rows[epoch] = _numbers(row) | self._rows.get(epoch, {})
        self._write()

    @rank_zero_only
    def truncate(self, epoch: int) -> None:
        """Removes the rows of `epoch`, the first of this training, and of all later epochs.

        A run that was killed may have logged epochs after its last checkpoint. It repeats them, and
        the rows would mix metrics of two trainings.
        """
        self._rows = {known: row for known, row in self._rows.items() if known < epoch}
        self._write()

    def hold(self) -> None:
        """Keeps rows in memory until `release`."""
        self._held = True

    @rank_zero_only
    def release(self) -> None:
        """Writes the table, from now on after each change."""
        self._held = False
        self._write()

    @rank_zero_only
    def _open(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Permissions do not say whether a file system is mounted read-only.
            with tempfile.TemporaryFile(dir=self._path.parent):
                pass
        except OSError as error:
            raise ValueError(
                "Expected `folder` to be a folder that can be written to but got "
                f"{self._path.parent} ({error.strerror})."
            ) from error
        if not self._path.exists():
            return
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    epoch = int(row.pop("epoch"))
                    self._rows[epoch] = {name: float(value) for name, value in row.items() if value}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"Expected `{self._path}` to be a table of numbers with a column `epoch` but got a "
                f"row that is not ({type(error).__name__}: {error})."
            ) from error

    def _write(self) -> None:
        if self._path is None or self._held:
            return
        columns = ["epoch", *sorted({name for row in self._rows.values() for name in row})]
        with atomic_write(self._path) as path, path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(self.rows)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name in metrics.keys() - {"epoch"}:
        with suppress(TypeError, ValueError):
            numbers[name] = float(metrics[name])
    return numbers
