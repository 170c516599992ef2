"""The robust loss around the weights that training ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import Dataset
from typing_extensions import override

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.final_measurement import Figures, FinalMeasurement
from robust_flatness.callbacks.loss_around import SURFACE, LossAround
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.callbacks.trajectory import run_folder, run_title, save_figure
from robust_flatness.functional.checks import Eps, check_choice, check_count, check_number
from robust_flatness.functional.directions import DirectionKind
from robust_flatness.functional.flatness import LossKind
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.noise import Norm
from robust_flatness.functional.weight_perturbation import RelativeTo
from robust_flatness.loggers.failures import warn_on_failure
from robust_flatness.run_folder.files import Landscape as Measured
from robust_flatness.run_folder.files import write_landscapes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTS = {"final": "final weights", "early_stopped": "early-stopped weights"}


class Landscape(FinalMeasurement):
    """Writes how RLoss rises around last and early-stopped weights (Fig. 4 of the paper).

    At the end of `fit` it writes `landscapes.npz`, the loss of each example at each point, and
    draws `figures/landscape.png`, with `figures/surface.png` and
    `figures/surface_early_stopped.png` where a surface is measured. In `test` the names end in
    `_test`; for other splits than `test` the split stands in them, as in `landscapes_train.npz`.
    Early-stopped weights are left out where they are the last ones. `reporting.read_landscapes`
    reads the file.

    Costs num_directions · num_steps attacks on each image for each kind of direction, and
    surface_steps² for a surface. Ranks share the images out; directions are the same on all.

    Args:
        split: `test`, `val` or `train`.
        dataset: Where the images come from; `None` finds the split.
        num_examples: The first so many images are measured; 128 in the paper.
        directions: Kinds of directions, `random`, `adversarial` or `hessian`, a panel of the
            figure each. See `functional.weight_directions`.
        num_directions: Of random and of adversarial directions; `hessian` is λ_max's alone.
        num_steps: Steps along each direction.
        relative_to: `layer`, `filter` or `network`: what the length of directions is relative to.
        length: That relative length; `None` is the paper's 0.5, or 0.025 for `adversarial`.
        loss: `robust`, or `clean` without attacks.
        surface_steps: Steps a side of a surface along two random directions; 0 leaves it out.
        eps: Radius of the attack; `None` takes the datamodule's `eps`, else 8/255.
        steps: Steps of the attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        restarts: Restarts of the attack.
        batch_size: Images measured at once, and the unit that ranks share out.
        seed: Of directions and starts.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Attributes:
        method: Name of what is trained, for titles; `None` for the module's class.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Landscape(directions=["random", "adversarial"], num_examples=64).state_key
        'Landscape[test]'
    """

    method: str | None = None

    def __init__(
        self,
        *,
        split: str = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 128,
        directions: Sequence[DirectionKind] = ("random",),
        num_directions: int = 10,
        num_steps: int = 51,
        relative_to: RelativeTo = "layer",
        length: float | None = None,
        loss: LossKind = "robust",
        surface_steps: int = 0,
        eps: Eps | None = None,
        steps: int = 10,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        restarts: int = 1,
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        check_count("num_directions", num_directions, low=1)
        check_count("num_steps", num_steps, low=2)
        check_choice("relative_to", relative_to, get_args(RelativeTo))
        check_choice("loss", loss, get_args(LossKind))
        check_count("surface_steps", surface_steps, low=2 if surface_steps else 0)
        check_number("length", 0.0 if length is None else length)
        for kind in directions:
            check_choice("directions", kind, get_args(DirectionKind))
        self._around = LossAround(
            kinds=directions,
            num_directions=num_directions,
            num_steps=num_steps,
            surface_steps=surface_steps,
            relative_to=relative_to,
            length=length,
            loss=loss,
            split=split,
            dataset=dataset,
            num_examples=num_examples,
            eps=eps,
            steps=steps,
            step_size=step_size,
            norm=norm,
            restarts=restarts,
            batch_size=batch_size,
            seed=seed,
            normalization=normalization,
        )
        self.split = split
        self._folder: Path | None = None
        self._suffix = ""

    @property
    def state_key(self) -> str:
        """Tells two callbacks of this class apart in checkpoints, by their split."""
        return f"Landscape[{self.split}]"

    @property
    def measurements(self) -> Sequence[Measurement]:
        """The one measurement, which has no figure to log."""
        return [self._around]

    @override
    def logged_name(self, name: str, weights: str) -> str:
        return f"{weights}/{name}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Here and not when it is needed, where the processes may no longer talk.
        self._folder = run_folder(trainer)
        split = "" if self.split == "test" else f"_{self.split}"
        self._suffix = split + ("_test" if stage == "test" else "")

    @override
    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Figures:
        self._around.found.clear()
        figures = super()._run(trainer, pl_module)
        if trainer.is_global_zero and self._folder is not None:
            self._write(trainer, pl_module, self._folder)
        return figures

    def _write(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        found = dict(zip(WEIGHTS, self._around.found))
        named = {
            f"{weights}/{name}": measured
            for weights, landscapes in found.items()
            for name, measured in landscapes.items()
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
                    _show(logger, images, max(trainer.current_epoch - 1, 0))

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, "Figure | None"]:
        # Only here, as matplotlib takes long to load.
        from robust_flatness.plotting.landscape_figures import landscape_figure, surface_figure

        found, around = dict(zip(WEIGHTS, self._around.found)), self._around
        look = {
            "title": run_title(trainer, pl_module, self.method),
            "loss_name": "RLoss" if around.loss == "robust" else "cross-entropy",
        }
        panels: dict[str, dict[str, Measured]] = {
            kind: {WEIGHTS[weights]: landscapes[kind] for weights, landscapes in found.items()}
            for kind in around.kinds
        }
        figures = {"landscape": landscape_figure(panels, **look)}
        for weights, landscapes in found.items():
            if SURFACE in landscapes:
                look_there = look | {"title": f"{look['title']}, {WEIGHTS[weights]}"}
                name = SURFACE if weights == "final" else f"{SURFACE}_{weights}"
                figures[name] = surface_figure(landscapes[SURFACE], **look_there)
        return figures

    def _settings(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        around = self._around
        lengths = {kind: around.length_of(kind) for kind in around.kinds}
        return {
            **around.attack_settings(trainer),
            "split": self.split,
            "num_examples": len(around.examples(trainer, pl_module)),
            "loss": around.loss,
            "relative_to": around.scale["relative_to"],
            "length": lengths
            | ({SURFACE: around.length_of("random")} if around.surface_steps else {}),
            "perturbed": list(perturbed_parameters(pl_module)),
        }


def _show(logger: WandbLogger, images: Mapping[str, Path], epoch: int) -> None:
    import wandb

    content: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in images.items()}
    if content:
        logger.log_metrics({**content, "epoch": epoch})
