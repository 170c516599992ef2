"""Callbacks that measure at the end of epochs."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from robust_flatness import measures
from robust_flatness.callbacks.measuring import (
    HoldsMeasure,
    MeasuringCallback,
    averaged_weights,
    fingerprint,
)
from robust_flatness.functional.checks import check_count, errors_on_all_ranks


class EpochMeasure(MeasuringCallback, HoldsMeasure):
    """Logs a measure at the end of epochs, without touching training.

    It serves any LightningModule whose `forward` maps images to logits and whose batches are
    `(images, labels)`. Measuring is in float32 (float64 if the weights are), outside autocast, in
    eval mode, divided among the processes by global index. If training averages weights, the
    averaged ones are measured. The last epoch is measured however training ends: if it turns out
    to be the last only afterwards, its metrics are logged when training has ended. A metric that is
    not finite is logged as it is. `trainer.test` is measured too, unless a `FinalMeasure` beside it
    logs these metrics there.

    Args:
        every_n_epochs: Epochs 0, n, 2n, … are measured, and the last one.
        **kwargs: `measure`, such as `measures.AverageCaseFlatness(xi=0.3)`, and arguments of
            `FixedImages`.

    Attributes:
        measure: The measure.
        metrics: Metrics of the last measurement in `fit`, by logged name.
        arrays: Values `(N,)` of each image in the last measurement, by name; may be empty.
        measured_step: Number of optimizer steps before the last measurement, -1 if there was none.
        measured_late: Whether it came when training had ended.

    Raises:
        ValueError: If an argument is out of range; before training, if another callback of this
            kind logs metrics of the same names, or beside Lightning's `StochasticWeightAveraging`;
            if anything else logs one of the metrics.

    Example:
        >>> flatness = measures.AverageCaseFlatness(num_perturbations=3)
        >>> EpochMeasure(measure=flatness, split="val").metric_names
        ('flatness/average/val', 'flatness/average/val_sem')
    """

    # Whether `trainer.test` is measured at all.
    measures_in_test: ClassVar[bool] = True

    def __init__(self, *, every_n_epochs: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("every_n_epochs", every_n_epochs, low=1)
        self.every_n_epochs = every_n_epochs
        self.arrays: dict[str, torch.Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        self.metrics: dict[str, float] = {}
        self.measured_step, self.measured_late = -1, False
        # Of the last measurement, if a checkpoint is judged by it.
        self.measured_weights: str | None = None
        self._unmeasured_epoch: int | None = None
        # The last value of each metric; one that is not defined keeps an earlier one.
        self._logged: dict[str, float] = {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Logged names, of which those that are not defined are left out."""
        return self.measure.metric_names(self.split)

    @property
    @override
    def state_key(self) -> str:
        measure = f"{type(self.measure).__name__}, " if type(self) is EpochMeasure else ""
        return f"{type(self).__name__}[{measure}{self.split}]"

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Returns the result of the measure, a dataclass, on every process."""
        with averaged_weights(trainer, pl_module):
            return self.measure_split(trainer, pl_module, self.split, self.measure)

    def compute(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Measures the weights that the module holds; returns metrics by logged name."""
        result = self.measure_split(trainer, pl_module, self.split, self.measure)
        self.arrays = self.measure.arrays(result, self.split)
        return self.measure.metrics(result, self.split)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._begin()
        if stage == "fit":
            self._follow_averages(trainer)
        callbacks = epoch_measures(trainer) if stage in ("fit", "test") else []
        logging = [c for c in callbacks if stage == "fit" or c.is_tested(trainer)]
        for one, other in combinations(logging, 2):
            # Lightning would log one value for both.
            if shared := sorted({*one.metric_names} & {*other.metric_names}):
                raise ValueError(
                    f"Expected callbacks to log metrics of different names but got {one.state_key} "
                    f"and {other.state_key}, which both log {', '.join(shared)}; leave one out, or "
                    "choose another `split`."
                )

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_names(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prepare(trainer, pl_module, self.split, [self.measure])
        others = epoch_measures(trainer)
        if trainer.state.fn == TrainerFn.FITTING and others and others[-1] is self:
            announce_cost(trainer, pl_module, others)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_tested(trainer):
            self.on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_due(trainer):
            self._unmeasured_epoch = None
            metrics = self.measure_epoch(trainer, pl_module, trainer.current_epoch)
            # The largest of equal values is exact for any number of processes; their mean is not.
            pl_module.log_dict(metrics, sync_dist=True, reduce_fx="max")
        else:
            self._unmeasured_epoch = trainer.current_epoch

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, self._unmeasured_epoch = self._unmeasured_epoch, None
        if epoch is None:
            return
        # It was not known at the end of the epoch that it was the last.
        self.measured_late = True
        metrics = self.measure_epoch(trainer, pl_module, epoch)
        # The module can no longer log.
        trainer.callback_metrics.update({name: torch.tensor(v) for name, v in metrics.items()})
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_metrics({**metrics, "epoch": epoch}, step=trainer.global_step)
            logger.save()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_tested(trainer):
            self._check_names(trainer, pl_module)
            pl_module.log_dict(self.compute(trainer, pl_module), sync_dist=True, reduce_fx="max")

    def measure_epoch(
        self, trainer: Trainer, pl_module: LightningModule, epoch: int
    ) -> dict[str, float]:
        """Measures the weights at the end of an epoch, averaged ones if training averages."""
        self._check_names(trainer, pl_module)
        with averaged_weights(trainer, pl_module):
            self.metrics = self.compute(trainer, pl_module)
            self._logged |= self.metrics
            monitors = [getattr(c, "monitor", None) for c in trainer.checkpoint_callbacks]
            watched = any(monitor in self.metrics for monitor in monitors)
            self.measured_weights = fingerprint(pl_module) if watched else None
            self.on_measured(trainer, pl_module, epoch)
        self.measured_step = trainer.global_step
        return self.metrics

    def on_measured(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Called when `metrics` are known, while the module holds the measured weights."""

    def _follow_averages(self, trainer: Trainer) -> None:
        """Moves the callbacks that measure behind those that average weights.

        These may average at the end of an epoch, and the average before that is not what is saved.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise ValueError(
                f"Expected {self.state_key} to measure the weights that training ends with but got "
                "StochasticWeightAveraging, whose average is not measured; use `WeightAveraging` "
                "of this package or of Lightning."
            )
        ends = [i for i, c in enumerate(callbacks, 1) if isinstance(c, WeightAveraging)]
        before = callbacks[: max(ends, default=0)]
        if self in before:
            moved = [c for c in before if isinstance(c, EpochMeasure)]
            others = [c for c in before if not isinstance(c, EpochMeasure)]
            callbacks = [*others, *moved, *callbacks[len(before) :]]
            trainer.callbacks = callbacks  # type: ignore[attr-defined]

    def _check_names(self, trainer: Trainer, module: LightningModule) -> None:
        """Raises if anything else has logged a metric of this callback's, as one would be lost."""
        logged = trainer.callback_metrics
        with errors_on_all_ranks():
            for name in sorted(logged.keys() & {*self.metric_names}):
                own, found = self._logged.get(name), torch.tensor(float(logged[name]))
                if own is None or not found.isclose(torch.tensor(own), 1e-6, 0, equal_nan=True):
                    raise ValueError(
                        f"Expected {self.state_key} alone to log {name} but something else logged "
                        f"{found:g} under this name; rename that metric, such as in `self.log` of "
                        f"{type(module).__name__}."
                    )

    def is_tested(self, trainer: Trainer) -> bool:
        """Returns whether `trainer.test` is measured; measures of the end come first."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, MeasuringCallback)]
        ends = [getattr(c, "measures", {}) for c in others if not isinstance(c, EpochMeasure)]
        parts = [(split, measure) for end in ends for split in end for measure in end[split]]
        names = {name for split, measure in parts for name in measure.metric_names(split)}
        return self.measures_in_test and names.isdisjoint(self.metric_names)

    def is_due(self, trainer: Trainer) -> bool:
        """Returns whether the current epoch is measured: every n-th from 0 on, and the last."""
        epoch, steps = trainer.current_epoch, trainer.global_step
        stops = trainer.should_stop and (
            epoch + 1 >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        )
        last = epoch + 1 == trainer.max_epochs or steps >= trainer.max_steps > -1 or stops
        return epoch % self.every_n_epochs == 0 or last


def epoch_measures(trainer: Trainer) -> list[EpochMeasure]:
    """Returns the trainer's callbacks that measure at the end of epochs."""
    return [c for c in trainer.callbacks if isinstance(c, EpochMeasure)]  # type: ignore[attr-defined]


class _HoldsRobustLoss(HoldsMeasure):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(measures.RobustLoss(**kwargs))


class RobustEvaluation(EpochMeasure, _HoldsRobustLoss):
    """Logs error, RLoss and RErr of a split, and RLoss of its correct and incorrect examples.

    The paper's Fig. 2 over epochs, see `measures.RobustLoss`.

    Args:
        **kwargs: Arguments of `EpochMeasure` and of `measures.RobustLoss`.

    Example:
        >>> RobustEvaluation(split="train", steps=20, restarts=10).state_key
        'RobustEvaluation[train]'
    """


class _HoldsFlatness(HoldsMeasure):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(measures.AverageCaseFlatness(**kwargs))


class Flatness(EpochMeasure, _HoldsFlatness):
    """Logs how much RLoss rises if weights move in random directions (Eq. 1); lower is flatter.

    Logs `flatness/average/test` and its standard error over directions,
    `flatness/average/test_sem`, see `measures.AverageCaseFlatness`. The defaults are the paper's,
    every epoch.

    Args:
        **kwargs: Arguments of `EpochMeasure` and of `measures.AverageCaseFlatness`.

    Example:
        >>> Flatness(num_perturbations=3, every_n_epochs=5).state_key
        'Flatness[test]'
    """


class _HoldsWorstCaseFlatness(HoldsMeasure):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(measures.WorstCaseFlatness(**kwargs))


class WorstCaseFlatness(EpochMeasure, _HoldsWorstCaseFlatness):
    """Logs how much RLoss rises if weights move in the worst direction; lower is flatter.

    Logs `flatness/worst/test`, see `measures.WorstCaseFlatness`. It costs about twice what
    `Flatness` does, so it is usually measured every few epochs, or once in `trainer.test`.

    Args:
        **kwargs: Arguments of `EpochMeasure` and of `measures.WorstCaseFlatness`.

    Example:
        >>> WorstCaseFlatness(restarts=2, every_n_epochs=10).state_key
        'WorstCaseFlatness[test]'
    """


class _HoldsCurvature(HoldsMeasure):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(measures.Curvature(**kwargs))


class Curvature(EpochMeasure, _HoldsCurvature):
    """Logs the extreme eigenvalues of the Hessian of the mean clean loss.

    Logs `hessian/max_eigenvalue`, `hessian/min_eigenvalue` and `hessian/convexity`, see
    `measures.Curvature`. The paper takes the last 500 test images, `split="val"` of this package's
    datamodules.

    Args:
        num_examples: Number of images, the first ones; all of them if there are fewer.
        **kwargs: Arguments of `EpochMeasure` and of `measures.Curvature`.

    Example:
        >>> Curvature(num_examples=128, every_n_epochs=5).state_key
        'Curvature[test]'
    """

    def __init__(self, *, num_examples: int = 500, **kwargs: Any) -> None:
        super().__init__(num_examples=num_examples, **kwargs)


def announce_cost(
    trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[EpochMeasure]
) -> None:
    """Prints what measuring costs in an epoch, unless this package's command line trains."""
    if not trainer.is_global_zero or _is_own_run(trainer, pl_module):
        return
    totals, unknown = [0.0, 0.0], []
    for callback in callbacks:
        passes = callback.measure.passes()
        if passes is None:
            unknown.append(type(callback).__name__)
        images = len(callback.examples(trainer, pl_module))
        for i, number in enumerate(passes or ()):
            totals[i] += number * images / callback.every_n_epochs
    forward, backward = map(_rounded, totals)
    line = (
        f"Measuring takes about {forward} forward and {backward} backward passes of images per "
        "epoch"
    )
    training_images = _training_images(trainer)
    if training_images is not None:
        line += f", training without attacks {_rounded(training_images)} of each"
    if unknown:
        line += f"; {', '.join(unknown)} adds passes that depend on the network"
    print(f"{line}.")


def _rounded(number: float) -> str:
    """Two digits of a number, as a third would be of no use."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _training_images(trainer: Trainer) -> int | None:
    """Number of images in an epoch of training, if the loader has one."""
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
    parts = [pl_module, *command_line]
    return bool(command_line) and all(
        type(p).__module__.startswith("robust_flatness.") for p in parts
    )
