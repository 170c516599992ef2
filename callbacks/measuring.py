"""What callbacks that measure share: reading, checking and measuring on all processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from robust_flatness.callbacks.evaluation_context import evaluation_context
from robust_flatness.callbacks.fixed_images import FixedImages, PixelInput, warn_of_one_class
from robust_flatness.functional.checks import check_examples, errors_on_all_ranks
from robust_flatness.functional.evaluation import first_logits
from robust_flatness.measures.base import DEFAULT_EPS, Measure
from robust_flatness.measures.processes import Processes

# Number of images whose logits are checked before training.
FIRST_IMAGES = 8
# Lightning uses a task's number as its place in the list, so none of its tasks may move: the task
# added here is hidden between measures, not removed.
_TASKS: WeakKeyDictionary[Progress, TaskID] = WeakKeyDictionary()


class HoldsMeasure:
    """Holds a measure. As the last base class it gets the arguments that callbacks leave over.

    Args:
        measure: What is measured.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure


class MeasuringCallback(FixedImages):
    """Measures a network in training, on fixed images, without touching training."""

    def prepare(
        self, trainer: Trainer, pl_module: LightningModule, split: str, measures: Sequence[Measure]
    ) -> None:
        """Reads the images of a split, so that what does not fit is refused before training.

        Raises:
            ValueError: On all processes, if there are no images, if they do not fit the network, if
                it does not return logits, or if a measure does not work with it.
        """
        examples = self.examples(trainer, pl_module, split)
        images = examples.images[:FIRST_IMAGES].to(pl_module.device)
        network = self._network(pl_module)
        with evaluation_context(trainer, pl_module), torch.no_grad(), errors_on_all_ranks():
            classes = first_logits(network, images).shape[1]
            check_examples(examples.images, examples.labels, classes)
            for measure in measures:
                measure.with_default_eps(data_eps(trainer)).check(network, images, classes)
        warn_of_one_class(examples, classes, split)

    def measure_split(
        self, trainer: Trainer, pl_module: LightningModule, split: str, measure: Measure
    ) -> Any:
        """Measures the weights that the module holds, on all processes together.

        Returns:
            The result for all images, on every process.
        """

        def progress(text: str, total: int) -> Any:
            return _progress_bar(trainer, f"{split}: {text}", total)

        examples = self.examples(trainer, pl_module, split)
        processes = Processes(trainer.global_rank, trainer.world_size, pl_module.device, progress)
        measure = measure.with_default_eps(data_eps(trainer))
        with evaluation_context(trainer, pl_module):
            return measure.measure_set(self._network(pl_module), examples, processes)

    def _network(self, module: LightningModule) -> nn.Module:
        """The module as a map from pixels in [0, 1] to logits."""
        return PixelInput(module, self.normalization) if self.normalization else module


def data_eps(trainer: Trainer) -> float:
    """Returns the radius of the attack that the datamodule suggests, or 8/255."""
    return float(getattr(getattr(trainer, "datamodule", None), "eps", DEFAULT_EPS))


def warn_if_results_stay(trainer: Trainer, callback: Callback, *attributes: str) -> None:
    """Warns if results of a callback stay in the processes that are spawned to compute them.

    Args:
        trainer: The trainer. Lightning brings weights and logged metrics back from `ddp_spawn` and
            the like, but not its callbacks.
        callback: The callback.
        attributes: Where it keeps its results.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            f"{', '.join(attributes)} of {type(callback).__name__} will be empty after training, "
            "as this strategy measures in other processes: use `ddp`, or "
            "`trainer.callback_metrics`."
        )


@contextmanager
def _progress_bar(trainer: Trainer, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar if the trainer shows Rich bars, and yields the function that advances it."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar) or not bar.is_enabled or total == 0:
        yield lambda: None
        return
    # A terminal has one live display, so a running one of Lightning's is used.
    running = bar.progress if bar.progress and bar.progress.live.is_started else None
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress: Progress = running or Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, transient=True
    )
    if not running:
        progress.start()
    if progress in _TASKS:
        progress.reset(_TASKS[progress], description=text, total=total, visible=True)
    else:
        _TASKS[progress] = progress.add_task(text, total=total)
    task = _TASKS[progress]
    try:
        yield lambda: progress.update(task, advance=1, refresh=True)
    finally:
        progress.update(task, visible=False, refresh=True)
        if not running:
            progress.stop()
