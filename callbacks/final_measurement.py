"""What is measured once, on the weights that training ends with and on the early-stopped ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from robust_flatness.callbacks.isolation import averaged_weights, swapped_weights
from robust_flatness.callbacks.logs import log_equal, log_final, warn_if_results_stay
from robust_flatness.callbacks.measured_images import FixedImages
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.callbacks.robust_early_stopping import early_stopping_of

Figures = dict[str, float]


class FinalMeasurement(FixedImages, ABC):
    """Measures at the end of `fit` and in `test`, on last and early-stopped weights.

    Early-stopped weights are those of a `RobustEarlyStopping` beside it, in `test` too, whose
    checkpoint brings them along.

    Attributes:
        final_results: `final` and `early_stopped` figures by name, and `num_examples` by name.
        final_arrays: What was found of each example, `final/…` and `early_stopped/…`.
    """

    def __init__(self) -> None:
        self.final_results: dict[str, dict[str, Any]] = {
            "final": {},
            "early_stopped": {},
            "num_examples": {},
        }
        self.final_arrays: dict[str, Tensor] = {}

    @abstractmethod
    def logged_name(self, name: str, weights: str) -> str:
        """The name under which a figure is logged after training.

        Args:
            name: The figure's name.
            weights: `final` or `early_stopped`.
        """

    @property
    @abstractmethod
    def measurements(self) -> Sequence[Measurement]:
        """What is measured, for the images that it needs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what an earlier run found."""
        super().setup(trainer, pl_module, stage)
        warn_if_results_stay(trainer, self, "final_results", "final_arrays")
        for part in (*self.final_results.values(), self.final_arrays):
            part.clear()
        for measurement in self.measurements:
            measurement.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the images, so that bad ones are refused before anything is trained."""
        for measurement in self.measurements:
            measurement.on_train_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the images, so that bad ones are refused before anything is measured."""
        self.on_train_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and hands the figures to the loggers; also if a finished run is resumed."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with _on_its_device(trainer, pl_module):
            log_final(trainer, self._run(trainer, pl_module))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs, so that `trainer.test` returns the figures."""
        figures = self._run(trainer, pl_module)
        log_equal(pl_module, {k.removeprefix("final/"): v for k, v in figures.items()})

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Figures:
        results, stopped = self.final_results, early_stopping_of(trainer)
        # A finished run that is resumed holds the weights of training, not their averages.
        with averaged_weights(trainer, pl_module):
            results["final"] = self._measure(trainer, pl_module, "final")
            equal = stopped is not None and _has_weights(pl_module, stopped.best_weights)
        if equal:
            results["early_stopped"] = dict(results["final"])
            for name, values in list(self.final_arrays.items()):
                self.final_arrays[name.replace("final/", "early_stopped/", 1)] = values
        elif stopped is not None:
            with swapped_weights(pl_module, stopped.best_weights):
                results["early_stopped"] = self._measure(trainer, pl_module, "early_stopped")
        return {
            self.logged_name(name, weights): value
            for weights in ("final", "early_stopped")
            for name, value in results[weights].items()
        }

    def _measure(self, trainer: Trainer, pl_module: LightningModule, weights: str) -> Figures:
        figures: Figures = {}
        for measurement in self.measurements:
            found = measurement.measure(trainer, pl_module)
            arrays = measurement.arrays.items()
            self.final_arrays |= {f"{weights}/{name}": values for name, values in arrays}
            figures |= found
            count = len(measurement.examples(trainer, pl_module))
            self.final_results["num_examples"] |= dict.fromkeys(found, count)
        return figures


@contextmanager
def _on_its_device(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Back to where it was trained: Lightning moves it to the CPU before `on_fit_end`."""
    before = module.device
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(before)


def _has_weights(module: LightningModule, weights: Mapping[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[name].cpu(), value.cpu()) for name, value in weights.items())
