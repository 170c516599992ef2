"""The robust loss around the weights that training ends with."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from robust_flatness.callbacks.final_evaluation import FinalMeasure, Metrics
from robust_flatness.callbacks.measuring import HoldsMeasure, data_eps
from robust_flatness.callbacks.trajectory import (
    name_of_test,
    run_folder,
    run_title,
    save_figure,
)
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.loggers.wandb import warn_on_failure
from robust_flatness.measures import LossLandscape, Measure
from robust_flatness.measures.landscape import SURFACE
from robust_flatness.run_folder.files import Landscape as SavedLandscape
from robust_flatness.run_folder.files import write_landscapes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTS = {"final": "final weights", "early_stopped": "early-stopped weights"}


class _HoldsLandscape(HoldsMeasure):
    measure: LossLandscape

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(LossLandscape(**kwargs))


class Landscape(FinalMeasure, _HoldsLandscape):
    """Writes how RLoss rises around last and early-stopped weights (Fig. 4 of the paper).

    At the end of `fit` it writes `landscapes.npz`, the loss of each example at each point, and
    draws `figures/landscape.png`, with `figures/surface.png` and
    `figures/surface_early_stopped.png` if a surface is measured. In `test` the names end in
    `_test`; for other splits than `test` they contain the split, as in `landscapes_train.npz`.
    Early-stopped weights are left out if they are the last ones. `reporting.read_landscapes` reads
    the file.

    Args:
        num_examples: Number of images, the first ones; 128 in the paper.
        **kwargs: Arguments of `FixedImages` and of `measures.LossLandscape`.

    Attributes:
        method: Name of what is trained, for titles; None for the module's class.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Landscape(directions=["random", "adversarial"], num_examples=64).state_key
        'Landscape[test]'
    """

    method: str | None = None

    def __init__(self, *, num_examples: int = 128, **kwargs: Any) -> None:
        super().__init__(num_examples=num_examples, **kwargs)
        self._landscapes: dict[str, dict[str, SavedLandscape]] = {}
        self._folder: Path | None = None
        self._suffix = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Here and not when it is needed, where the processes may no longer talk.
        self._folder = run_folder(trainer)
        self._suffix = "" if self.split == "test" else f"_{self.split}"
        if stage == "test":
            self._suffix += f"_{name_of_test(trainer, self._folder)}"

    @override
    def keep(self, weights: str, split: str, measure: Measure, result: Any) -> Metrics:
        self._landscapes[weights] = {
            name: SavedLandscape(landscape.coordinates.numpy(), landscape.losses.numpy())
            for name, landscape in result.items()
        }
        return {}

    @override
    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> Metrics:
        self._landscapes.clear()
        metrics = super()._measure_all(trainer, pl_module)
        if trainer.is_global_zero and self._folder is not None:
            self._write(trainer, pl_module, self._folder)
        return metrics

    def _write(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        named = {
            f"{weights}/{name}": landscape
            for weights, landscapes in self._landscapes.items()
            for name, landscape in landscapes.items()
        }
        settings = self._settings(trainer, pl_module)
        write_landscapes(folder / f"landscapes{self._suffix}.npz", named, settings)
        images = {}
        with warn_on_failure("draw the landscape"):
            for name, figure in self._figures(trainer, pl_module).items():
                if figure is not None:
                    path = folder / "figures" / f"{name}{self._suffix}.png"
                    images[f"figures/{path.stem}"] = save_figure(figure, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.state.fn == "fit":
                with warn_on_failure("log the landscape to Weights & Biases"):
                    _log_images(logger, images, max(trainer.current_epoch - 1, 0))

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, "Figure | None"]:
        # Only here, as matplotlib takes long to load.
        from robust_flatness.plotting.landscape_figures import landscape_figure, surface_figure

        title = run_title(trainer, pl_module, self.method)
        loss_name = "RLoss" if self.measure.loss == "robust" else "cross-entropy"
        panels: dict[str, dict[str, SavedLandscape]] = {
            kind: {WEIGHTS[weights]: named[kind] for weights, named in self._landscapes.items()}
            for kind in self.measure.directions
        }
        figures = {"landscape": landscape_figure(panels, title=title, loss_name=loss_name)}
        for weights, landscapes in self._landscapes.items():
            if SURFACE in landscapes:
                name = SURFACE if weights == "final" else f"{SURFACE}_{weights}"
                figures[name] = surface_figure(
                    landscapes[SURFACE], title=f"{title}, {WEIGHTS[weights]}", loss_name=loss_name
                )
        return figures

    def _settings(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        measure = self.measure
        surface = [SURFACE] if measure.surface_steps else []
        return {
            "eps": data_eps(trainer) if measure.eps is None else measure.eps,
            "steps": measure.steps,
            "restarts": measure.restarts,
            "step_size": measure.step_size,
            "norm": measure.norm,
            "seed": measure.seed,
            "batch_size": measure.batch_size,
            "split": self.split,
            "num_examples": len(self.examples(trainer, pl_module)),
            "loss": measure.loss,
            "relative_to": measure.relative_to,
            "length": {name: measure.length_of(name) for name in (*measure.directions, *surface)},
            "perturbed": list(perturbed_parameters(pl_module)),
        }


def _log_images(logger: WandbLogger, images: Mapping[str, Path], epoch: int) -> None:
    import wandb

    content: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in images.items()}
    if content:
        logger.log_metrics({**content, "epoch": epoch})
