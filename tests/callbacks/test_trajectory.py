"""A toy module, and a callback that measures every second epoch, in front of `Trajectory`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from wandb_reader import read_runs

from robust_flatness.callbacks import trajectory
from robust_flatness.callbacks.trajectory import Trajectory
from robust_flatness.loggers import EpochCSVLogger, make_wandb_logger
from robust_flatness.plotting import figures

EVERY_EPOCH = {"epoch", "train/robust_loss", "val/robust_error"}
MEASURED = {"flatness/average/test", "test/robust_loss"}


class Toy(LightningModule):
    num_classes = 3

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/robust_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        errors = (self.network(batch[0]).argmax(1) != batch[1]).float()
        self.log("val/robust_error", errors.mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/robust_loss", batch[0].sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measure(Callback):
    """Logs as measuring callbacks do: in the hook of the epoch's end, and only where it is due."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch % 2 == 0:
            norm = pl_module.network[1].weight.detach().norm()
            pl_module.log("flatness/average/test", norm, sync_dist=True)
            pl_module.log("test/robust_loss", norm**2, sync_dist=True)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(16, 4, generator=generator), torch.arange(16) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def make_trainer(folder: Path, *callbacks: Callback, epochs: int = 4, **kwargs: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[Measure(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **{"logger": EpochCSVLogger(folder), "log_every_n_steps": 1, "devices": 1} | kwargs,
    )


def fit(
    folder: Path, *callbacks: Callback, resume: bool = False, dropout: float = 0.0, **kwargs: Any
) -> Trainer:
    seed_everything(1, verbose=False)
    trainer = make_trainer(folder, *callbacks, **kwargs)
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(Toy(dropout), loader(), loader(), ckpt_path=last if resume else None)
    return trainer


def last_checkpoint() -> ModelCheckpoint:
    return ModelCheckpoint(filename="last", enable_version_counter=False)


def test_rows_hold_what_was_logged_in_their_epoch_and_nothing_stale(tmp_path: Path) -> None:
    callback = Trajectory()
    fit(tmp_path, callback)
    assert [set(row) for row in callback.rows] == [EVERY_EPOCH | MEASURED, EVERY_EPOCH] * 2
    assert [row["epoch"] for row in callback.rows] == [0, 1, 2, 3]
    assert EpochCSVLogger(tmp_path).rows == callback.rows
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["overfitting.png", "trajectory.png"]
    assert all((tmp_path / "figures" / name).stat().st_size > 5_000 for name in names)


def test_figures_are_drawn_for_finished_epochs_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def figure(rows: Any, **kwargs: Any) -> None:
        drawn.append(([row["epoch"] for row in rows], "train/robust_loss" in rows[-1], kwargs))

    monkeypatch.setattr(figures, "trajectory_figure", lambda *_, **__: None)
    monkeypatch.setattr(figures, "overfitting_figure", figure)
    best = Callback()
    best.best_epoch = 1  # type: ignore[attr-defined]
    fit(tmp_path, best, Trajectory(every_n_epochs=2), epochs=5)
    arguments = {"title": "Toy", "num_classes": 3, "best_epoch": 1}
    assert drawn == [([*range(n)], True, arguments) for n in (2, 4, 5)]


def test_no_logger_keeps_folders_as_they_are(tmp_path: Path) -> None:
    callback, checkpoint = Trajectory(), ModelCheckpoint()
    trainer = fit(tmp_path, callback, checkpoint, logger=False, epochs=2)
    assert len(callback.rows) == 2
    assert trainer.log_dir == str(tmp_path)
    assert checkpoint.dirpath == str(tmp_path / "checkpoints")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "figures"}


def test_a_stock_logger_stays_the_first(tmp_path: Path) -> None:
    callback, checkpoint = Trajectory(), ModelCheckpoint()
    logger = CSVLogger(tmp_path, name="stock")
    trainer = fit(tmp_path, callback, checkpoint, logger=logger, epochs=2)
    assert trainer.loggers[0] is trainer.logger is logger
    assert trainer.log_dir == logger.log_dir
    assert checkpoint.dirpath == str(Path(logger.log_dir) / "checkpoints")
    assert (Path(logger.log_dir) / "figures" / "overfitting.png").exists()
    assert len(callback.rows) == 2


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    weights = [
        fit(tmp_path, *watching, dropout=0.5).lightning_module.network[1].weight
        for watching in ((), (Trajectory(every_n_epochs=1),))
    ]
    assert torch.equal(*weights)


def test_fast_dev_run_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, Trajectory(), logger=False, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_two_and_two_epochs_are_four(tmp_path: Path) -> None:
    fit(tmp_path / "whole", Trajectory(), last_checkpoint())
    fit(tmp_path / "parts", Trajectory(), last_checkpoint(), epochs=2)
    fit(tmp_path / "parts", Trajectory(), last_checkpoint(), resume=True)
    tables = [(tmp_path / part / "metrics.csv").read_text() for part in ("whole", "parts")]
    assert tables[0].count("\n") == 5
    assert tables[0] == tables[1]


def test_a_kill_between_checkpoint_and_loggers_loses_nothing(tmp_path: Path) -> None:
    class Killed(EpochCSVLogger):
        """Stops the process where the last epoch's training figures are about to be logged."""

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if metrics["epoch"] == 2 and "train/robust_loss" in metrics:
                raise KeyboardInterrupt
            super().log_metrics(metrics, step)

    whole = Trajectory()
    fit(tmp_path / "whole", whole)
    folder = tmp_path / "killed"
    with pytest.raises(SystemExit):
        fit(folder, Trajectory(), last_checkpoint(), logger=Killed(folder))
    assert EpochCSVLogger(folder).rows[2].keys() == {"epoch", "val/robust_error"}

    # The checkpoint is that of epoch 2: training goes on with epoch 3 or, with three epochs, ends.
    done = Trajectory()
    fit(folder, done, last_checkpoint(), resume=True, epochs=3)
    assert done.rows == whole.rows[:3]
    assert EpochCSVLogger(folder).rows == whole.rows[:3]
    fit(folder, done, last_checkpoint(), resume=True)
    assert done.rows == whole.rows


def test_rows_that_the_checkpoint_does_not_know_are_dropped(tmp_path: Path) -> None:
    fit(tmp_path, Trajectory(), last_checkpoint(), epochs=2)
    logger = EpochCSVLogger(tmp_path)
    logger.log_metrics({"epoch": 2, "killed/later": 1.0})
    logger.log_metrics({"epoch": 7, "killed/later": 1.0})
    callback = Trajectory()
    fit(tmp_path, callback, last_checkpoint(), resume=True)
    assert [row["epoch"] for row in callback.rows] == [0, 1, 2, 3]
    assert not any("killed/later" in row for row in callback.rows)


def test_a_lost_table_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    first = Trajectory()
    fit(tmp_path, first, last_checkpoint(), epochs=2)
    (tmp_path / "metrics.csv").unlink()
    fit(tmp_path, Trajectory(), last_checkpoint(), resume=True)
    assert EpochCSVLogger(tmp_path).rows[:2] == first.rows


def test_the_state_is_plain_and_holds_fresh_figures_only(tmp_path: Path) -> None:
    fit(tmp_path, Trajectory(), last_checkpoint(), epochs=2)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    rows = content["callbacks"]["Trajectory"]["rows"]
    assert [set(row) for row in rows] == [EVERY_EPOCH | MEASURED, EVERY_EPOCH]
    assert {type(value) for row in rows for value in row.values()} == {int, float}
    assert rows == EpochCSVLogger(tmp_path).rows


def test_a_new_run_in_an_old_folder_starts_a_new_table(tmp_path: Path) -> None:
    fit(tmp_path, Trajectory(), epochs=3)
    fit(tmp_path, Trajectory(), epochs=1)
    assert [row["epoch"] for row in EpochCSVLogger(tmp_path).rows] == [0]


def test_testing_leaves_the_table_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Trajectory(), last_checkpoint(), epochs=2)
    before = (tmp_path / "metrics.csv").read_text()
    trainer.test(trainer.lightning_module, loader(), verbose=False)
    callback = Trajectory()
    trainer = make_trainer(tmp_path, callback)
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer.test(Toy(), loader(), ckpt_path=last, verbose=False)
    assert (tmp_path / "metrics.csv").read_text() == before
    assert len(callback.rows) == 2


def test_a_wrong_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `every_n_epochs` to be >= 1 but got 0"):
        Trajectory(every_n_epochs=0)


def test_wandb_gets_images_table_and_chart(tmp_path: Path) -> None:
    loggers = [EpochCSVLogger(tmp_path), make_wandb_logger(tmp_path, project="p", name="n")]
    fit(tmp_path, Trajectory(every_n_epochs=3), logger=loggers)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    drawn = [step for step in run.history if "figures/trajectory/_type" in step]
    assert [(step["epoch"], step["trajectory_table/nrows"]) for step in drawn] == [(2, 2), (3, 2)]
    assert all("figures/overfitting/_type" in step for step in drawn)
    assert run.metrics["train/robust_loss"].step_metric == "epoch"
    assert len([step for step in run.history if "train/robust_loss" in step]) == 4


@pytest.mark.slow
def test_two_processes_write_one_table(tmp_path: Path) -> None:
    fit(tmp_path, Trajectory(), last_checkpoint(), epochs=2, devices=2, strategy="ddp_spawn")
    rows = EpochCSVLogger(tmp_path).rows
    assert [set(row) for row in rows] == [EVERY_EPOCH | MEASURED, EVERY_EPOCH]
    assert (tmp_path / "figures" / "trajectory.png").exists()
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["callbacks"]["Trajectory"]["rows"] == rows


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_split_that_is_logged_is_drawn(tmp_path: Path, split: str) -> None:
    class Other(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            loss = {"val": "val", "train": "train_eval"}[split]
            pl_module.log(f"flatness/average/{split}", 0.5)
            pl_module.log(f"{loss}/robust_loss", 1.5)

    wandb_logger = make_wandb_logger(tmp_path, project="p", name="n")
    trainer = make_trainer(
        tmp_path, Other(), Trajectory(), logger=[EpochCSVLogger(tmp_path), wandb_logger]
    )
    # Without what is measured on test images.
    trainer.callbacks = trainer.callbacks[1:]
    trainer.fit(Toy(), loader(), loader())
    wandb.finish()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"trajectory.png", "overfitting.png"}
    (run,) = read_runs(tmp_path)
    assert run.summary["trajectory_table/nrows"] == 4


def test_it_says_why_it_draws_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Trajectory())
    trainer.callbacks = trainer.callbacks[1:]
    with pytest.warns(UserWarning, match="no epoch logged both of one split: add Flatness and"):
        trainer.fit(Toy(), loader(), loader())


def test_a_figure_or_a_table_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("many\n\nlines")

    monkeypatch.setattr(trajectory, "save_figure", fail)
    with pytest.warns(UserWarning, match="could not draw the trajectory: ValueError: lines"):
        trainer = fit(tmp_path, Trajectory())
    assert trainer.current_epoch == 4
