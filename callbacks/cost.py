"""What watching costs, said before a project of somebody else's begins to train."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

if TYPE_CHECKING:
    from robust_flatness.callbacks.measurement import Measurement


def announce_cost(
    trainer: Trainer, pl_module: LightningModule, measurements: Sequence["Measurement"]
) -> None:
    """Prints what measuring costs in an epoch, unless this package's command line trains.

    Args:
        trainer: About to train.
        pl_module: What it trains.
        measurements: All that measure at the end of epochs, with their images read.
    """
    if trainer.is_global_zero and not _is_own_run(trainer, pl_module):
        print(_line(measurements, _training_images(trainer)))


def _line(measurements: Sequence["Measurement"], training_images: int | None) -> str:
    totals, unknown = [0.0, 0.0], []
    for measurement in measurements:
        passes, images = measurement.passes(), measurement.count_of_images()
        if passes is None:
            unknown.append(type(measurement).__name__)
        for i, number in enumerate(passes or ()):
            totals[i] += number * images / measurement.every_n_epochs
    forward, backward = map(_rounded, totals)
    line = (
        f"Watching costs about {forward} forward and {backward} backward passes of images an epoch"
    )
    if training_images is not None:
        line += f", beside {_rounded(training_images)} of each for training without attacks"
    if unknown:
        line += f"; {', '.join(unknown)} comes on top, at a cost that depends on the network"
    return f"{line}."


def _rounded(number: float) -> str:
    """Two digits of a number, as a third would be of no use."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _training_images(trainer: Trainer) -> int | None:
    """Images of an epoch of training, if the loader says how many there are."""
    loader: Any = trainer.train_dataloader
    batches = trainer.num_training_batches
    batch_size = getattr(loader, "batch_size", None)
    if batch_size is None or math.isinf(batches):
        return None
    images = int(batches) * batch_size * trainer.world_size
    try:
        return min(images, len(loader.dataset))
    except (AttributeError, TypeError):
        return images


def _is_own_run(trainer: Trainer, pl_module: LightningModule) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    command_line = [c for c in callbacks if isinstance(c, SaveConfigCallback)]
    return all(map(_is_own, [pl_module, *command_line])) and bool(command_line)


def _is_own(part: object) -> bool:
    return type(part).__module__.startswith("robust_flatness.")
