"""How a run starts, and how it is interrupted."""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from robust_flatness.loggers import EpochCSVLogger, EpochWandbLogger

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
    spec, script = getattr(sys.modules["__main__"], "__spec__", None), sys.argv[0] or "cli.py"
    program = ["python", script] if script.endswith(".py") else [Path(script).name]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    if last.is_relative_to(Path.cwd()):
        last = last.relative_to(Path.cwd())
    return shlex.join([*program, "fit", "--ckpt_path", str(last)])
