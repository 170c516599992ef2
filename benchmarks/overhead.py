"""What Lightning costs in each step: milliseconds above a bare loop that trains the same.

python benchmarks/overhead.py
python benchmarks/overhead.py --profile "means, once an epoch"   # where its time goes

The network is a linear layer on batches of 32, so that hardly anything but overhead is left. Each
variant sees the same batches from the same loader; only the steps are timed, neither the trainer's
set-up nor the end of the epoch. The goal is on a trainer whose module adds its figures up on the
device and logs them once an epoch, as `AT` does with three of them.
"""

import argparse
import cProfile
import io
import logging
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rounds import Goal, Rounds, begin, benchmark_parser, print_goals
from timed_trainers import quiet_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from robust_flatness.lightning_modules import AT
from robust_flatness.lightning_modules.at import EpochMeans
from robust_flatness.loggers import EpochCSVLogger

BARE, MEANS = "bare loop", "means, once an epoch"
Batches = DataLoader[Any]
Timed = Callable[[], float]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all variants."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def flat_linear(num_classes: int, in_channels: int) -> nn.Module:
    """The network of all variants, on images of 4x4 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


class Plain(LightningModule):
    """Trains and tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = flat_linear(10, 1)
        self.means = EpochMeans()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        logits = self.network(images)
        loss = cross_entropy(logits, labels)
        self.tell(loss.detach(), logits.detach(), labels)
        return loss

    def tell(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Comes after the loss."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer without a schedule."""
        return optimizer_of(self)


class Means(Plain):
    """Adds three figures up in each step, by the code of `AT`, and logs them once an epoch."""

    def tell(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds up."""
        AT._record(self, loss, logits, labels, {})  # type: ignore[arg-type]

    def on_train_epoch_end(self) -> None:
        """Logs."""
        self.means.log(self)


class EachStep(Plain):
    """Logs one figure in each step, the usual way."""

    def tell(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Logs."""
        self.log("train/loss", loss)


class Manual(Plain):
    """Takes the steps of its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """A step."""
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        loss.backward()
        optimizer.step()
        return loss


def unattacked() -> AT:
    """All that `AT` does in a step but the attack."""
    arguments: dict[str, Any] = {"mean": [0.5], "std": [0.5], "in_channels": 1}
    return AT(flat_linear, **arguments, steps=0, keep="last", start="zero", optimizer=_sgd)


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


class Stopwatch(Callback):
    """CPU seconds from the first step of the epoch to the last."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """Stops after the last."""
        if trainer.is_last_batch:
            self.seconds = time.process_time() - self.started


def fitted(make: Callable[[], LightningModule], batches: Batches, **settings: Any) -> float:
    """Seconds of one epoch in a trainer."""
    watch = Stopwatch()
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, **settings)
    trainer.fit(make(), batches)
    return watch.seconds


def looped(batches: Batches) -> float:
    """Seconds of the same epoch in a loop."""
    network = flat_linear(10, 1)
    optimizer = optimizer_of(network)
    started = time.process_time()
    for images, labels in batches:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    return time.process_time() - started


def variants(batches: Batches, folder: str) -> dict[str, Timed]:
    """What is timed, by name."""

    def as_shipped() -> float:
        # What the command line adds to a trainer: its table of epochs and its progress bar.
        table = EpochCSVLogger(Path(folder))
        settings = {"logger": table, "log_every_n_steps": 1, "enable_progress_bar": True}
        with redirect_stdout(io.StringIO()):
            return fitted(Means, batches, callbacks=[RichProgressBar()], **settings)

    return {
        BARE: partial(looped, batches),
        "nothing logged": partial(fitted, Plain, batches),
        MEANS: partial(fitted, Means, batches),
        "means, with CSV and progress bar": as_shipped,
        "AT without attack": partial(fitted, unattacked, batches),
        "one self.log each step": partial(fitted, EachStep, batches),
        "manual optimization, nothing logged": partial(fitted, Manual, batches),
    }


def made_batches(steps: int) -> Batches:
    """Batches that are made already, in a loader that only hands them out."""
    made = [(torch.rand(32, 1, 4, 4), torch.randint(10, (32,))) for _ in range(steps)]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def profile(run: Timed, given: argparse.Namespace) -> None:
    """Prints where a variant's time goes."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    pstats.Stats(profiler).strip_dirs().sort_stats("cumulative").print_stats(given.lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, or profiles one variant."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", metavar="VARIANT", help="one of the table's names")
    parser.add_argument("--lines", type=int, default=60, help="of the profile")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    begin(given)
    with tempfile.TemporaryDirectory() as folder:
        tried = variants(made_batches(given.steps), folder)
        if given.profile:
            profile(tried[given.profile], given)
            return
        found = Rounds.told(tried, given.rounds)
    above = {name: [1000 * s for s in found.differences(name, given.steps)] for name in tried}
    column = {name: f"{median(values):.2f}" for name, values in above.items()}
    title = f"Linear(16, 10), batches of 32, {given.steps} steps"
    found.print_table(
        title, "CPU ms a step", lambda s: 1000 * s / given.steps, columns={f"above {BARE}": column}
    )
    print_goals([Goal(f"{MEANS}, ms a step above {BARE}", above[MEANS], 0.5)])


if __name__ == "__main__":
    main()
