"""How a run starts, with images as pixels in [0, 1], and how it is interrupted."""

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from robust_flatness.callbacks.fixed_images import ROUNDING, check_normalized
from robust_flatness.lightning_modules import AT, External
from robust_flatness.loggers import EpochCSVLogger, EpochWandbLogger
from robust_flatness.networks import Normalize
from robust_flatness.run_folder.environment import shown, started_as

# Statuses of processes that a signal ended, as shells report them.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class RunStart(SaveConfigCallback):
    """Writes to the run folder, and opens the W&B run, once a first batch has been trained on.

    Until then any argument, image or weight may still be refused, and nothing is left of a run that
    is. Loggers keep what they are sent meanwhile.

    Attributes:
        wandb_logger: Joins the trainer's loggers in `setup`, because Lightning opens those that it
            has before it sets anything up.
    """

    wandb_logger: EpochWandbLogger | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.wandb_logger is not None and self.wandb_logger not in trainer.loggers:
            trainer.loggers = [*trainer.loggers, self.wandb_logger]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._start(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finished run that is resumed has no further batch, and is measured once more.
        if trainer.num_training_batches == 0:
            raise ValueError("Expected training data of at least one batch but got none.")
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved:
            return
        for logger in trainer.loggers:
            if isinstance(logger, (EpochCSVLogger, EpochWandbLogger)):
                logger.release()
        # Last, as the folder of a run that has started is known by its config.yaml.
        super().setup(trainer, pl_module, "fit")


def undo_normalization(
    data: LightningDataModule, model: LightningModule, callbacks: Sequence[Callback]
) -> None:
    """Has normalized images measured, and trained on, as pixels in [0, 1].

    Callbacks take the `normalization` of the data, `(mean, std)` of each channel, unless they have
    one of their own, and a module of the user's own takes the images as they are delivered. Modules
    of this package take pixels: for them it is undone as each batch arrives.
    """
    normalization = getattr(data, "normalization", None)
    if normalization is None:
        return
    try:
        mean, std = (list(map(float, values)) for values in normalization)
        Normalize(mean, std)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `normalization` of {type(data).__name__} to be (mean, std), a finite number "
            f"and one > 0 for each channel, but got {normalization}."
        ) from error
    if isinstance(model, (AT, External)):
        data.on_after_batch_transfer = partial(_to_pixels, data, mean, std)  # type: ignore[method-assign]
        return
    for callback in callbacks:
        if getattr(callback, "normalization", std) is None:
            callback.normalization = (mean, std)  # type: ignore[attr-defined]


def _to_pixels(
    data: LightningDataModule,
    mean: Sequence[float],
    std: Sequence[float],
    batch: Any,
    dataloader_idx: int,
) -> Any:
    """The batch of the data's own hook, with images in [0, 1]."""
    batch = type(data).on_after_batch_transfer(data, batch, dataloader_idx)
    if not isinstance(batch, (list, tuple)):
        raise ValueError(
            f"Expected batches (images, labels) of {type(data).__name__} but got "
            f"{type(batch).__name__}."
        )
    images, *rest = batch
    if not getattr(data, "_is_checked", False):
        # Once only: the check waits for the device.
        check_normalized(images, (mean, std))
        data._is_checked = True  # type: ignore[attr-defined]
    scale, shift = (images.new_tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = images * scale + shift
    rounded = (pixels >= -ROUNDING) & (pixels <= 1 + ROUNDING)
    # Others were not normalized like this, which the first batch's check says.
    return [torch.where(rounded, pixels.clamp(0, 1), pixels), *rest]


@contextmanager
def sigterm_exits(*, at_once: bool) -> Iterator[None]:
    """Has SIGTERM raise `SystemExit(143)`, so that whatever is open is closed in order.

    While Lightning trains, it ends training after the batch instead, unless `at_once`.
    """

    def end(signum: int, frame: Any) -> None:
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
    """The exit status if a signal ended the run, else None.

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
    """What resumes the run of a folder, in the form that this process was started in, if it can."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return None
    return shlex.join([*started_as(), "fit", "--ckpt_path", str(shown(last))])
