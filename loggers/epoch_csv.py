"""A table of a run that grows by one row an epoch and survives being killed.

Lightning's own `CSVLogger` writes the validation and the training figures of an epoch into two
rows, and deletes the file when a run is resumed. Here everything that belongs to an epoch meets in
one row, and a run that goes on in its folder goes on in its table.

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
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from robust_flatness.run_folder.files import atomic_write


class EpochCSVLogger(Logger):
    """Keeps one row an epoch and writes them to `<folder>/metrics.csv`.

    The column `epoch` comes first, the others follow in alphabetical order. Rows that are in the
    file already are read, so that nothing is missing after a resume. `Trajectory` calls `truncate`
    and `refill` when a run starts or goes on; a project without it can call them itself. Only rank
    0 keeps and writes rows.

    Args:
        folder: The run folder, which is created where it does not exist. With None, rows are kept
            in memory only.
        write: Whether the folder is read and written. Without, `folder` is only what `save_dir`
            says.

    Attributes:
        recording: Whether figures are taken in. `Trajectory` turns it off outside `fit`, where
            Lightning counts epochs from 0 again and would overwrite the row of the first.

    Raises:
        ValueError: If the folder cannot be created or written to, or if its `metrics.csv` is no
            table of this class.
    """

    def __init__(self, folder: str | Path | None, *, write: bool = True) -> None:
        super().__init__()
        self.recording = True
        self._save_dir = None if folder is None else str(folder)
        self._path = Path(folder) / "metrics.csv" if folder is not None and write else None
        self._rows: dict[int, dict[str, float]] = {}
        self._held = False
        self._open()

    @property
    def name(self) -> str:
        """Is empty, since the folder of the run is named in full."""
        return ""

    @property
    def version(self) -> str:
        """Is empty, so that checkpoints go to `<folder>/checkpoints`."""
        return ""

    @property
    def save_dir(self) -> str | None:
        """The run folder."""
        return self._save_dir

    @property
    def log_dir(self) -> str | None:
        """The run folder."""
        return self._save_dir

    @property
    def experiment(self) -> DummyExperiment:
        """Takes any call and does nothing, for modules that draw to `self.logger.experiment`."""
        return DummyExperiment()

    @property
    def rows(self) -> list[dict[str, float]]:
        """A copy of the rows in the order of their epochs: `epoch`, then the figures by name."""
        return [
            {"epoch": epoch} | dict(sorted(self._rows[epoch].items()))
            for epoch in sorted(self._rows)
        ]

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds figures to the row of their epoch.

        Args:
            metrics: Names and numbers, `epoch` among them. Without `epoch` nothing is kept, and
                what is no number (an image, a table) is left to other loggers.
            step: Ignored.
        """
        if self.recording and "epoch" in metrics and (figures := _numbers(metrics)):
            self._rows.setdefault(int(metrics["epoch"]), {}).update(figures)
            self._write()

    @override
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps nothing, since the run folder holds a `config.yaml`."""

    @rank_zero_only
    def refill(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Fills in epochs and figures that are missing; what is there stays as it is.

        Args:
            rows: Rows with an `epoch`, as `rows` gives them.
        """
        for row in rows:
            epoch = int(row["epoch"])
            self._rows[epoch] = _numbers(row) | self._rows.get(epoch, {})
        self._write()

    @rank_zero_only
    def truncate(self, epoch: int) -> None:
        """Drops the rows of `epoch` and of all later ones.

        A run that was killed may have logged epochs that its checkpoint does not know. It goes
        through them again, and would leave figures of two different trainings in one row.

        Args:
            epoch: The epoch that training starts with, counted from 0.
        """
        self._rows = {known: row for known, row in self._rows.items() if known < epoch}
        self._write()

    def hold(self) -> None:
        """Leaves the file as it is until `release`; rows are kept in memory."""
        self._held = True

    @rank_zero_only
    def release(self) -> None:
        """Writes the rows that `hold` kept, and all later ones as they come."""
        self._held = False
        self._write()

    @rank_zero_only
    def _open(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Asking for permissions is not enough: a file system may be mounted read-only.
            with tempfile.TemporaryFile(dir=self._path.parent):
                pass
        except OSError as error:
            raise ValueError(
                "Expected `folder` to be a folder that can be written to but got "
                f"{self._path.parent} ({error.strerror})."
            ) from error
        if self._path.exists():
            self._rows = _read(self._path)

    def _write(self) -> None:
        if self._path is None or self._held:
            return
        columns = ["epoch", *sorted({name for row in self._rows.values() for name in row})]
        with (
            atomic_write(self._path) as beside,
            beside.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(self.rows)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            continue
    numbers.pop("epoch", None)
    return numbers


def _read(path: Path) -> dict[int, dict[str, float]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {
            int(row["epoch"]): {
                name: float(value) for name, value in row.items() if name != "epoch" and value
            }
            for row in rows
        }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"Expected `{path}` to be a table of numbers with a column `epoch` but got a row that "
            f"is not ({type(error).__name__}: {error})."
        ) from error
