"""Trainers that the benchmarks time."""

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer


def quiet_trainer(**settings: Any) -> Trainer:
    """A trainer on one CPU that writes and shows nothing, unless its settings say so."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | settings))


def train_on(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, epochs: int = 1
) -> None:
    """Trains some epochs more than the trainer has so far."""
    trainer.fit_loop.max_epochs += epochs  # type: ignore[operator]
    trainer.fit(module, datamodule=data)
