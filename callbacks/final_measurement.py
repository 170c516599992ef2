"""What is measured once, on the weights that training ends with and on the early-stopped ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from robust_flatness.callbacks.isolation import swapped_weights
from robust_flatness.callbacks.logs import log_equal, log_final
from robust_flatness.callbacks.robust_early_stopping import early_stopping_of

Figures = dict[str, float]


class FinalMeasurement(Callback, ABC):
    """Measures at the end of `fit` and in `test`, on last and early-stopped weights.

    Early-stopped weights are those of a `RobustEarlyStopping` beside it, in `test` too, whose
    checkpoint brings them along.

    Attributes:
        final_results: `final` and `early_stopped` figures by name, and `num_examples` by name.
    """

    def __init__(self) -> None:
        self.final_results: dict[str, dict[str, Any]] = {
            "final": {},
            "early_stopped": {},
            "num_examples": {},
        }

    @abstractmethod
    def measure_all(self, trainer: Trainer, pl_module: LightningModule) -> Figures:
        """Figures of the module as it stands, by name."""

    @abstractmethod
    def logged_name(self, name: str, weights: str) -> str:
        """The name under which a figure is logged after training.

        Args:
            name: The figure's name.
            weights: `final` or `early_stopped`.
        """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and hands the figures to the loggers; also if a finished run is resumed."""
        log_final(trainer, dict(self._run(trainer, pl_module)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs, so that `trainer.test` returns the figures."""
        figures = dict(self._run(trainer, pl_module))
        log_equal(pl_module, {k.removeprefix("final/"): v for k, v in figures.items()})

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, float]]:
        self._measure_into("final", trainer, pl_module)
        stopped = early_stopping_of(trainer)
        if stopped is not None:
            with swapped_weights(pl_module, stopped.best_weights):
                self._measure_into("early_stopped", trainer, pl_module)
        for weights in ("final", "early_stopped"):
            for name, value in self.final_results[weights].items():
                yield self.logged_name(name, weights), value

    def _measure_into(self, weights: str, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self.measure_all(trainer, pl_module)
        # NaN marks a mean over nothing, say of no incorrect examples: there is no such figure.
        self.final_results[weights] = {k: v for k, v in figures.items() if v == v}
