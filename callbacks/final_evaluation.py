"""What is measured once, on the weights that training ends with and on the early-stopped ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from robust_flatness.callbacks.fixed_images import Normalization
from robust_flatness.callbacks.measuring import (
    HoldsMeasure,
    MeasuringCallback,
    averaged_weights,
    swapped_weights,
    warn_if_results_stay,
)
from robust_flatness.callbacks.robust_early_stopping import early_stopping_of
from robust_flatness.functional.checks import check_choice, check_count
from robust_flatness.functional.flatness import Protocol
from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.measures import (
    AdaptiveSharpness,
    AttackChecks,
    AutoAttackError,
    AverageCaseFlatness,
    BoundaryThickness,
    Curvature,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
    LocalLipschitz,
    Margins,
    Measure,
    RobustLoss,
    WorstCaseFlatness,
)
from robust_flatness.measures.base import Split
from robust_flatness.measures.robust_loss import PREFIX

Metrics = dict[str, float]
# In the run folder, until the run has ended.
AUTOATTACK_FOLDER = "autoattack"


class FinalMeasure(MeasuringCallback, HoldsMeasure):
    """Measures at the end of `fit` and in `test`, on last and early-stopped weights.

    Early-stopped weights are those of a `RobustEarlyStopping` beside it, in `test` too, whose
    checkpoint contains them. A warning leaves them out if they no longer fit the network.

    Args:
        **kwargs: `measure`, such as `measures.WorstCaseFlatness()`, and arguments of `FixedImages`.

    Attributes:
        final_results: `final` and `early_stopped` metrics by name, and `num_examples` by name.
        final_arrays: Values of each image by name, `final/…` and `early_stopped/…`. Values of fewer
            images than others are those of the first ones.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.final_results: dict[str, dict[str, Any]] = {
            "final": {},
            "early_stopped": {},
            "num_examples": {},
        }
        self.final_arrays: dict[str, Tensor] = {}

    @property
    def measures(self) -> Mapping[str, Sequence[Measure]]:
        """What is measured on each split."""
        return {self.split: [self.measure]}

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.split}]"

    def logged_name(self, name: str, weights: str) -> str:
        """Returns the name of a metric of `final` or `early_stopped` weights in loggers."""
        return f"{weights}/{name}"

    def count_of(self, measure: Measure) -> int | None:
        """Returns the number of images for a measure; None for all."""
        return None

    def keep(self, weights: str, split: str, measure: Measure, result: Any) -> Metrics:
        """Keeps a result and returns its metrics."""
        arrays = measure.arrays(result, split).items()
        self.final_arrays |= {f"{weights}/{name}": values for name, values in arrays}
        return measure.metrics(result, split)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        warn_if_results_stay(trainer, self, "final_results", "final_arrays")
        for part in (*self.final_results.values(), self.final_arrays):
            part.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for split, measures in self.measures.items():
            fewest = min((n for m in measures if (n := self.count_of(m))), default=None)
            self.prepare(trainer, pl_module, split, measures, fewest)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with _on_training_device(trainer, pl_module):
            metrics = self._measure_all(trainer, pl_module)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                # In the history they would be charts of one point each.
                logger.experiment.summary.update(dict(metrics))
            else:
                logger.log_metrics(dict(metrics), step=trainer.global_step)
                logger.save()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self._measure_all(trainer, pl_module)
        metrics = {name.removeprefix("final/"): value for name, value in metrics.items()}
        # The largest of equal values is exact for any number of processes; their mean is not.
        pl_module.log_dict(metrics, sync_dist=True, reduce_fx="max")

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> Metrics:
        results, stopped = self.final_results, early_stopping_of(trainer)
        best = {} if stopped is None else stopped.best_weights
        if differing := _misfits(pl_module, best):
            best = {}
            rank_zero_warn(
                f"{type(self).__name__} measures the final weights alone: the early-stopped ones "
                f"no longer fit the network, which differs in {differing[0]}, as pruning that is "
                "made permanent does."
            )
        # A finished run that is resumed holds the weights of training, not their averages.
        with averaged_weights(trainer, pl_module):
            results["final"] = self._measure_weights(trainer, pl_module, "final")
            equal = bool(best) and _has_weights(pl_module, best)
        if equal:
            results["early_stopped"] = dict(results["final"])
            for name, values in list(self.final_arrays.items()):
                self.final_arrays[name.replace("final/", "early_stopped/", 1)] = values
        elif best:
            with swapped_weights(pl_module, best):
                metrics = self._measure_weights(trainer, pl_module, "early_stopped")
                results["early_stopped"] = metrics
        return {
            self.logged_name(name, weights): value
            for weights in ("final", "early_stopped")
            for name, value in results[weights].items()
        }

    def _measure_weights(
        self, trainer: Trainer, pl_module: LightningModule, weights: str
    ) -> Metrics:
        metrics: Metrics = {}
        for split, measures in self.measures.items():
            for measure in measures:
                count = self.count_of(measure)
                result = self.measure_split(trainer, pl_module, split, measure, count)
                measured = self.keep(weights, split, measure, result)
                images = len(self.examples(trainer, pl_module, split))
                count = images if count is None else min(count, images)
                self.final_results["num_examples"] |= dict.fromkeys(measured, count)
                metrics |= measured
        return metrics


class FinalEvaluation(FinalMeasure):
    """RLoss, RErr and flatness by the paper's protocol, for last and early-stopped weights.

    The first 1000 test and training images, PGD-20 with 10 restarts, flatness from 10 directions
    at ξ = 0.5 (Sec. 3). Logged as `final/test/robust_loss`, …, and `early_stopped/test/…`, with the
    gaps between both splits, test minus training images, as `gap/robust_loss` and
    `gap/robust_error`.

    Args:
        splits: What is measured.
        datasets: Where the images of a split come from; others are those of the data.
        num_examples: Number of images of each split.
        num_flatness_examples: Number of images for flatness and extras, the first of each split;
            None or a larger number for all `num_examples`.
        normalization: `(mean, std)` if module and datasets use normalized images.
        num_perturbations: Number of directions of the flatness; 0 leaves it out.
        xi: Relative length ξ of a perturbation in each layer.
        protocol: Protocol of the flatness, `shared` or `paper`.
        extras: Further measures of each split, or `all`: `margins`, `lipschitz` (local Lipschitz
            constant), `thickness` (of the boundary), `checks` (attacks that show misleading
            gradients, see `run_folder.attack_checks`), `clean` (average-case flatness of the
            clean loss, from the same directions), `worst` and `clean_worst` (worst-case flatness
            at ξ = 0.003 with as many restarts), `curvature` (extreme eigenvalues of the Hessian),
            `adaptive_average` and `adaptive_worst` (sharpness relative to each weight, in batches
            of 128), `gradient_norm`, `first_order` (largest gradient near the weights), these four
            also with `clean_` in front for the clean loss, and `hessian_trace`. The start of
            `fit` states the cost.
        steps: Number of steps of the attack.
        restarts: Number of restarts for RLoss, RErr and worst-case flatness. Average-case flatness
            takes one.
        **kwargs: Arguments of `measures.RobustLoss`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> FinalEvaluation(splits=["test"]).splits
        ['test']
    """

    def __init__(
        self,
        *,
        splits: Sequence[str] = ("test", "train"),
        datasets: Mapping[str, Dataset[Any]] | None = None,
        num_examples: int = 1000,
        num_flatness_examples: int | None = None,
        normalization: Normalization | None = None,
        num_perturbations: int = 10,
        xi: float = 0.5,
        protocol: Protocol = "shared",
        extras: Sequence[str] | str = (),
        steps: int = 20,
        restarts: int = 10,
        **kwargs: Any,
    ) -> None:
        robust_loss = RobustLoss(steps=steps, restarts=restarts, **kwargs)
        super().__init__(
            measure=robust_loss, num_examples=num_examples, normalization=normalization
        )
        if num_flatness_examples is not None:
            check_count("num_flatness_examples", num_flatness_examples, low=1)
        self.num_flatness_examples = num_flatness_examples
        if not splits:
            known = ", ".join(get_args(Split))
            raise ValueError(f"Expected `splits` to name some of {known} but got none.")
        for split in splits:
            check_choice("splits", split, get_args(Split))
        named = [extras] if isinstance(extras, str) else extras
        for extra in named:
            check_choice("extras", extra, (*EXTRAS, "all"))
        self.splits, self.datasets = list(splits), dict(datasets or {})
        self.extras = list(EXTRAS) if "all" in named else list(named)
        self.restarts, self.num_perturbations, self.xi = restarts, num_perturbations, xi
        self.attack = {"steps": steps, **kwargs}
        self._measures: list[Measure] = [robust_loss]
        if num_perturbations:
            self._measures.append(
                AverageCaseFlatness(
                    num_perturbations=num_perturbations, xi=xi, protocol=protocol, **self.attack
                )
            )
        self._measures += [EXTRAS[extra](self) for extra in self.extras]

    @property
    @override
    def measures(self) -> Mapping[str, Sequence[Measure]]:
        return dict.fromkeys(self.splits, self._measures)

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        costs = []
        for name, measure in zip(self.extras, self._measures[-len(self.extras) :]):
            passes = measure.passes()
            text = "depends on the network" if passes is None else "{:,} + {:,}".format(*passes)
            costs.append(f"{name} {text}")
        if costs and trainer.is_global_zero:
            print(f"Forward + backward passes of each image for extras: {', '.join(costs)}.")

    @override
    def dataset_of(self, split: str) -> Dataset[Any] | None:
        return self.datasets.get(split)

    @override
    def count_of(self, measure: Measure) -> int | None:
        return None if measure is self.measure else self.num_flatness_examples

    @override
    def _measure_weights(
        self, trainer: Trainer, pl_module: LightningModule, weights: str
    ) -> Metrics:
        metrics = super()._measure_weights(trainer, pl_module, weights)
        # The generalization gap, test minus training images (Sec. 4).
        for name in ("robust_loss", "robust_error"):
            pair = [metrics.get(f"{prefix}/{name}") for prefix in ("test", "train_eval")]
            if pair[0] is not None and pair[1] is not None:
                metrics[f"gap/{name}"] = pair[0] - pair[1]
        for split in self.splits:
            labels = self.examples(trainer, pl_module, split).labels
            self.final_arrays[f"{weights}/{PREFIX[split]}/labels"] = labels
        return metrics


# The number of images in a batch is part of the definition of sharpness.
SHARPNESS_BATCH = {"batch_size": 128}
# Measures by name. An extra takes from the evaluation what it shares with it: `attack` is the
# arguments of `AttackMeasure`.
EXTRAS: dict[str, Callable[[FinalEvaluation], Measure]] = {
    "clean": lambda e: AverageCaseFlatness(
        loss="clean", num_perturbations=max(1, e.num_perturbations), xi=e.xi, **e.attack
    ),
    "worst": lambda e: WorstCaseFlatness(restarts=e.restarts, **e.attack),
    "clean_worst": lambda e: WorstCaseFlatness(loss="clean", restarts=e.restarts, **e.attack),
    "margins": lambda e: Margins(**e.attack),
    "lipschitz": lambda e: LocalLipschitz(**e.attack),
    "thickness": lambda e: BoundaryThickness(batch_size=e.measure.batch_size, seed=e.measure.seed),
    "checks": lambda e: AttackChecks(**{**e.attack, "steps": min(10, e.attack["steps"])}),
    "curvature": lambda e: Curvature(batch_size=e.measure.batch_size, seed=e.measure.seed),
    "adaptive_average": lambda e: AdaptiveSharpness(**e.attack | SHARPNESS_BATCH),
    "adaptive_worst": lambda e: AdaptiveSharpness(case="worst", **e.attack | SHARPNESS_BATCH),
    "clean_adaptive_average": lambda e: AdaptiveSharpness(
        loss="clean", **e.attack | SHARPNESS_BATCH
    ),
    "clean_adaptive_worst": lambda e: AdaptiveSharpness(
        case="worst", loss="clean", **e.attack | SHARPNESS_BATCH
    ),
    "hessian_trace": lambda e: HessianTrace(**e.attack),
    "gradient_norm": lambda e: GradientNorm(**e.attack),
    "clean_gradient_norm": lambda e: GradientNorm(loss="clean", **e.attack),
    "first_order": lambda e: FirstOrderFlatness(**e.attack),
    "clean_first_order": lambda e: FirstOrderFlatness(loss="clean", **e.attack),
}


class _HoldsAutoAttack(HoldsMeasure):
    measure: AutoAttackError

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(AutoAttackError(**kwargs))


class AutoAttack(FinalMeasure, _HoldsAutoAttack):
    """Logs AutoAttack's robust error (Croce & Hein, 2020) of last and early-stopped weights.

    Runs at the end of `fit` and in `test`. Logs `test/autoattack_error` and
    `test/autoattack_error_early_stopped`, see `measures.AutoAttackError`. In a run folder, which an
    `EpochCSVLogger` names, verdicts of finished chunks are kept until the run has ended: a run that
    was killed in between reads them from there.

    Names of metrics are the same for all versions and attacks. `attacks` says which ran, also in
    `results.json`; tables and reports call an error AutoAttack only if it is by `standard`.

    Args:
        **kwargs: Arguments of `FixedImages` and of `measures.AutoAttackError`.

    Attributes:
        attacks: By the name of the metric, `autoattack` for `standard`, else such as
            `apgd-ce+apgd-t`; empty before measuring.

    Raises:
        ValueError: If an argument is out of range; before training, if an attack does not work
            with the number of classes or the size of the images.

    Example:
        >>> AutoAttack(num_examples=64).state_key
        'AutoAttack[test]'
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attacks: dict[str, str] = {}

    @override
    def keep(self, weights: str, split: str, measure: Measure, result: Any) -> Metrics:
        metrics = super().keep(weights, split, measure, result)
        self.attacks |= dict.fromkeys(metrics, result.attacks)
        return metrics

    @override
    def logged_name(self, name: str, weights: str) -> str:
        return name if weights == "final" else f"{name}_early_stopped"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        tables = [logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger)]
        folder = trainer.strategy.broadcast(tables[0].log_dir if tables else None)
        self.measure.folder = None if folder is None else Path(folder) / AUTOATTACK_FOLDER

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if trainer.is_global_zero:
            self.measure.remove_verdicts()


class _Network(LightningModule):
    """A network as a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def _no_step(batch: Any, batch_idx: int) -> None:
    """A `test_step` of modules that have none: callbacks measure."""


def evaluate(
    network: nn.Module,
    data: LightningDataModule | DataLoader[Any] | Dataset[Any] | Sequence[Tensor],
    measurements: Sequence[FinalMeasure] | None = None,
    **trainer: Any,
) -> Metrics:
    """Measures a network as `fit` does at its end and `test` does.

    Args:
        network: Maps images `(N, C, H, W)` in [0, 1] to logits.
        data: A datamodule, from which the images of the splits come; or the images of `test`: a
            loader or dataset of pairs `(image, label)`, or tensors `(images, labels)`.
        measurements: What is measured, such as `FinalEvaluation(restarts=5)` and `AutoAttack()`;
            None takes the paper's protocol without AutoAttack, on `test` alone if `data` has no
            other split.
        **trainer: Arguments of Lightning's `Trainer`: `devices=2`, `accelerator="cpu"`, …

    Returns:
        Metrics by name, `test/robust_loss`, `flatness/average/test`, ….

    Raises:
        ValueError: If `data` or `network` is something else, or they do not fit each other.

    Example:
        >>> from robust_flatness.datamodules import Digits
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> light = FinalEvaluation(num_examples=4, steps=1, restarts=1, num_perturbations=1)
        >>> settings = {"enable_progress_bar": False, "accelerator": "cpu"}
        >>> metrics = evaluate(network, Digits(), [light], **settings)
        >>> metrics["test/robust_error"] >= metrics["test/error"]
        True
    """
    source = _source(data)
    if not isinstance(network, nn.Module):
        raise ValueError(f"Expected `network` to be a torch.nn.Module but got {_kind(network)}.")
    if measurements is None:
        whole = "datamodule" in source
        measurements = [FinalEvaluation() if whole else FinalEvaluation(splits=["test"])]
    chosen = list(measurements)
    module = network if isinstance(network, LightningModule) else _Network(network)
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    tester = Trainer(callbacks=list(chosen), **{**settings, **trainer})
    has_step = is_overridden("test_step", module)
    if not has_step:
        module.test_step = _no_step  # type: ignore[method-assign]
    try:
        tester.test(module, verbose=False, **source)
    finally:
        if not has_step:
            del module.test_step
    return {
        name: value
        for measurement in chosen
        for name, value in measurement.final_results["final"].items()
    }


def _source(data: Any) -> dict[str, Any]:
    """Arguments of `Trainer.test`."""
    if isinstance(data, LightningDataModule):
        return {"datamodule": data}
    if isinstance(data, DataLoader):
        return {"dataloaders": data}
    pair = isinstance(data, (list, tuple)) and [isinstance(part, Tensor) for part in data]
    if pair == [True, True] and len(data[0]) == len(data[1]):
        data = TensorDataset(*data)
    if isinstance(data, Dataset):
        return {"dataloaders": DataLoader(data, batch_size=128)}
    raise ValueError(
        "Expected `data` to be a datamodule, a DataLoader, a Dataset of pairs (image, label), or "
        f"as many images as labels, but got {_kind(data)}."
    )


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    parts = value if isinstance(value, (list, tuple)) else []
    shapes = [f"{type(part).__name__}{list(getattr(part, 'shape', ''))}" for part in parts[:3]]
    return f"{type(value).__name__} of {', '.join(shapes)}" if shapes else type(value).__name__


@contextmanager
def _on_training_device(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Lightning moves the module to the CPU before `on_fit_end`."""
    before = module.device
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(before)


def _misfits(module: LightningModule, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that a module lacks, has in addition or has in another shape."""
    own, other = (
        {(name, value.shape) for name, value in state.items()}
        for state in (module.state_dict(), weights)
    )
    return sorted({name for name, _ in own ^ other}) if weights else []


def _has_weights(module: LightningModule, weights: Mapping[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[name].cpu(), value.cpu()) for name, value in weights.items())
