"""Figures of a run while it trains: its path through robust loss and flatness, and overfitting.

The metrics of all callbacks and of the module are the rows of an `EpochCSVLogger`, one an epoch.
From these, `Trajectory` draws robust loss against flatness (Fig. 5 of the paper) and the curves of
robust overfitting (Fig. 2), and it keeps the rows complete if a run is killed and resumed.

Example:
    In any Lightning project, beside callbacks that log `flatness/average/test` and
    `test/robust_loss`::

        Trainer(callbacks=[Flatness(), Trajectory(every_n_epochs=5)])
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from robust_flatness.callbacks.measuring import warn_if_results_stay
from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.loggers.figures import log_figures
from robust_flatness.loggers.wandb import warn_on_failure
from robust_flatness.run_folder.files import atomic_write
from robust_flatness.run_folder.metrics import LOSSES, logged_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trajectory(Callback):
    """Writes `figures/trajectory.png` and `figures/overfitting.png`, and sends both to loggers.

    Weights & Biases, TensorBoard and MLflow get the figures and the path, see `log_figures`.

    Rows come from the first `EpochCSVLogger` of the trainer, because a logger receives only what
    was logged in that epoch, while `trainer.callback_metrics` keeps old values of what is measured
    every few epochs. If there is none, one that keeps its rows in memory is appended to the
    loggers.

    Drawn is the first of the splits `test`, `val` and `train` of which an epoch has flatness and
    robust loss; if none has, a warning at the end of training says so. A figure that cannot be
    drawn is a warning too.

    An epoch is drawn when the next one starts or training ends, because loggers receive its
    metrics after all hooks of the epoch's end. `ModelCheckpoint` writes before that, so the state
    of this callback holds the metrics that have not reached the loggers yet. If a run is resumed,
    rows of epochs that it is going to repeat are dropped, and rows that the file lacks are added.

    Args:
        every_n_epochs: How often figures are drawn during training; at its end they always are.
        figures: Whether to draw at all. Without, rows are still kept complete, and loggers still
            get the path, W&B as a table and a chart.

    Attributes:
        method: Name of what is trained, for titles; None for the module's class.

    Raises:
        ValueError: If `every_n_epochs` is below 1.
    """

    method: str | None = None

    def __init__(self, every_n_epochs: int = 5, figures: bool = True) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"Expected `every_n_epochs` to be >= 1 but got {every_n_epochs}.")
        self.every_n_epochs = every_n_epochs
        self.figures = figures
        self._trainer: Trainer | None = None
        self._table: EpochCSVLogger | None = None
        self._folder: Path | None = None
        self._from_checkpoint: list[dict[str, float]] = []
        self._logged_before: dict[str, Any] = {}
        self._ended_epoch: int | None = None

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows so far, in the order of their epochs; none on other processes than the first."""
        rows = {int(row["epoch"]): row for row in self._from_checkpoint}
        for row in self._table.rows if self._table else []:
            rows[int(row["epoch"])] = rows.get(int(row["epoch"]), {}) | row
        return [rows[epoch] for epoch in sorted(rows)]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)
        self._trainer = trainer
        tables = [logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger)]
        for table in tables:
            table.recording = stage == "fit"
        if stage == "fit" and not tables:
            # The folder keeps `trainer.log_dir` what it was if this is the only logger.
            tables = [EpochCSVLogger(trainer.default_root_dir, write=False)]
            trainer.loggers = [*trainer.loggers, *tables]
        self._table = tables[0] if tables else None
        if stage == "fit":
            warn_if_results_stay(trainer, self, "rows")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now is `current_epoch` the one that comes next, also after a resume.
        if self._table is not None:
            self._table.truncate(trainer.current_epoch)
        self._restore()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that is resumed has nothing new to draw, and may still be refused.
        if self._ended_epoch is not None and trainer.current_epoch % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)
        self._ended_epoch = None
        self._logged_before = dict(trainer.logged_metrics)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended_epoch = trainer.current_epoch

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended_epoch = None
        self._draw(trainer, pl_module)
        if trainer.is_global_zero and self.rows and logged_split(self.rows) is None:
            rank_zero_warn(
                "Trajectory draws no path through flatness and robust loss because no epoch logged "
                "both of one split: add Flatness and RobustEvaluation of the same `split`."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finished run that is resumed skips training and all of its hooks.
        self._restore()

    @override
    def state_dict(self) -> dict[str, Any]:
        rows = {int(row["epoch"]): row for row in self.rows}
        if self._ended_epoch is not None:
            epoch = self._ended_epoch
            rows[epoch] = {"epoch": epoch} | self._fresh_metrics() | rows.get(epoch, {})
        return {"rows": [rows[epoch] for epoch in sorted(rows)]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._from_checkpoint = list(state_dict["rows"])

    def _restore(self) -> None:
        if self._table is not None:
            self._table.refill(self._from_checkpoint)
            self._from_checkpoint = []

    def _fresh_metrics(self) -> dict[str, float]:
        """Returns what this epoch logged, part of which has not reached the loggers."""
        # Lightning makes a new tensor for each value it logs, so one that is the same object as
        # when the epoch began is the value of an earlier epoch. `…_step` belongs to a batch.
        logged = self._trainer.logged_metrics if self._trainer else {}
        return {
            name: float(value)
            for name, value in logged.items()
            if value is not self._logged_before.get(name) and not name.endswith("_step")
        }

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self.rows
        if not trainer.is_global_zero or not rows:
            return
        images: dict[str, Path] = {}
        split = logged_split(rows) or "test"
        with warn_on_failure("draw the trajectory"):
            if self.figures and self._folder:
                images = self._save_figures(trainer, pl_module, split)
        names = (f"flatness/average/{split}", LOSSES[split])
        for logger in trainer.loggers:
            with warn_on_failure(f"log the trajectory to {type(logger).__name__}"):
                log_figures(logger, rows, images, names)

    def _save_figures(
        self, trainer: Trainer, pl_module: LightningModule, split: str
    ) -> dict[str, Path]:
        # Only here, as matplotlib takes long to load.
        from robust_flatness.plotting.figures import overfitting_figure, trajectory_figure

        rows, title = self.rows, run_title(trainer, pl_module, self.method)
        figures = {
            "trajectory": trajectory_figure(rows, title=title, split=split),
            "overfitting": overfitting_figure(
                rows,
                title=title,
                num_classes=_num_classes(trainer, pl_module),
                best_epoch=early_stopped_epoch(trainer),
            ),
        }
        folder = (self._folder or Path()) / "figures"
        return {
            name: save_figure(figure, folder / f"{name}.png")
            for name, figure in figures.items()
            if figure
        }


def early_stopped_epoch(trainer: Trainer) -> int | None:
    """Returns the `best_epoch` of the first callback that has one, counted from 0."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        epoch = getattr(callback, "best_epoch", None)
        if epoch is not None and epoch >= 0:
            return int(epoch)
    return None


def datamodule_of(trainer: Trainer) -> Any:
    """Returns the trainer's datamodule, or None if it has loaders instead."""
    return getattr(trainer, "datamodule", None)


def run_folder(trainer: Trainer) -> Path | None:
    """Returns where a run's files belong, or None for `fast_dev_run`, which leaves none.

    All processes must call it, because Lightning broadcasts the folder from the first.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    return None if getattr(trainer, "fast_dev_run", False) else folder


def name_of_test(trainer: Trainer, folder: Path | None) -> str:
    """Returns what files of `trainer.test` are called by: `test`, or the tested checkpoint.

    `test` is a test of `last.ckpt`, or of a checkpoint from elsewhere, which has a folder of its
    own.
    """
    path = Path(trainer.ckpt_path or "").resolve()
    own = folder is not None and folder.resolve() in path.parents
    return path.stem if own and path.stem != "last" else "test"


def _num_classes(trainer: Trainer, pl_module: LightningModule) -> int | None:
    for owner in (datamodule_of(trainer), pl_module):
        number = getattr(owner, "num_classes", None)
        if isinstance(number, int) and number > 1:
            return number
    return None


def run_title(trainer: Trainer, pl_module: LightningModule, method: str | None) -> str:
    """Returns the title of a run's figures: the method, by default the class, and the data."""
    title, data = method or type(pl_module).__name__, datamodule_of(trainer)
    return title if data is None else f"{title} on {type(data).__name__}"


def save_figure(figure: "Figure", path: Path) -> Path:
    """Writes a figure as PNG and returns its path."""
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png")
    return path
