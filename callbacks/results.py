"""One file at the end of a run that holds everything a report needs, and a table in the terminal.

Example:
    After the callbacks that measure, because it reads their `final_results`::

        Trainer(callbacks=[Flatness(), Trajectory(), Results()])
"""

import json
import math
import os
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from robust_flatness.callbacks.final_evaluation import AutoAttack
from robust_flatness.callbacks.trajectory import (
    Trajectory,
    datamodule_of,
    early_stopped_epoch,
    name_of_test,
    run_folder,
)
from robust_flatness.functional.checks import takes
from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.loggers.wandb import log_summary, warn_on_failure
from robust_flatness.run_folder.attack_checks import attack_checks, class_errors, error_curve
from robust_flatness.run_folder.environment import hardware, shown, versions
from robust_flatness.run_folder.files import jsonable, write_arrays, write_json
from robust_flatness.run_folder.metrics import LOSSES, metric
from robust_flatness.run_folder.summary import summary_table


class Results(Callback):
    """Writes `results.json` after `fit` and `results_test.json` after `test`, and prints a table.

    The test of another checkpoint than `last.ckpt` has a file of its own, `results_best.json`. An
    earlier test with metrics that a new one lacks is kept as `results_test-1.json` and so on.

    Metrics come from the callbacks that have an attribute `final_results`, a dictionary with
    `final` and `early_stopped` (metrics by name) and `num_examples` (number of images by the same
    names). The values of each example, their `final_arrays`, are written to `examples.npz` (and
    `examples_test.npz`) under names such as `final/test/robust_loss`. Other metrics of images are
    taken from the trajectory: its last row has those of the final weights, and the row of the
    early-stopped epoch those of the early-stopped ones.

    From these values follow `checks`, `error_curve` and `class_errors` of `final` and
    `early_stopped`, see `run_folder.attack_checks`. What was not measured is left out. Failed
    checks are printed below the table.

    `attacks` has the attacks that an `AutoAttack` ran, by the name of its metric.

    `diverged_epoch` is the first epoch whose RLoss of fixed images was not finite (without RLoss,
    its flatness), `null` if there is none. JSON has no NaN and no infinity: these are `null`.

    Wall time is that of all parts of a run that was resumed. `earlier_settings` has the settings of
    the parts that had others, each with the first epoch (from 0) that it did not train.

    Args:
        settings: The settings of the run; None takes the module's hyperparameters.
        method: Name of what is trained; None takes the module's class.
    """

    def __init__(self, settings: dict[str, Any] | None = None, method: str | None = None) -> None:
        self.settings, self.method = settings, method
        self._folder: Path | None = None
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._earlier: list[dict[str, Any]] = []
        self._fitting = False
        self._table: Table | None = None
        self._failed: list[str] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here and not when it is needed: the processes may no longer communicate then.
        self._folder = run_folder(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._fitting = time.monotonic(), True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._earlier and self._earlier[-1]["settings"] == jsonable(self.settings):
            self._earlier.pop()
        elif self._earlier:
            self._earlier[-1]["before_epoch"] = trainer.current_epoch

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds_before, self._fitting = self._fit_seconds(), False
        if trainer.is_global_zero:
            self._finish(trainer, pl_module, "results.json", self._seconds_before)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            seconds = time.monotonic() - self._started
            name = f"results_{name_of_test(trainer, self._folder)}.json"
            self._finish(trainer, pl_module, name, seconds)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Only now has the progress bar left the terminal.
        if self._table is not None:
            for part in (self._table, *self._failed):
                Console().print(part, markup=False, highlight=False)
            self._table, self._failed = None, []

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"before_epoch": None, "settings": jsonable(self.settings)}
        return {"wall_time_seconds": self._fit_seconds(), "settings": [*self._earlier, own]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = float(state_dict["wall_time_seconds"])
        # Older checkpoints have none.
        self._earlier = list(state_dict.get("settings", ()))

    def _fit_seconds(self) -> float:
        now = time.monotonic() - self._started if self._fitting else 0.0
        return self._seconds_before + now

    def _finish(
        self, trainer: Trainer, pl_module: LightningModule, name: str, seconds: float
    ) -> None:
        measured = _gather(trainer)
        results = self._describe(trainer, pl_module)
        results |= {"wall_time_seconds": round(seconds, 1), **measured}
        results |= {
            "early_stopped_epoch": early_stopped_epoch(trainer),
            "trajectory": _rows(trainer),
        }
        diverged = (row["epoch"] for row in results["trajectory"] if not _is_finite(row))
        results["diverged_epoch"] = next(diverged, None)
        if trainer.state.fn != "fit":
            results["checkpoint"] = Path(trainer.ckpt_path).stem if trainer.ckpt_path else None
            _add_logged(results["final"], trainer)
        else:
            results["epochs"] = trainer.current_epoch
            if self._earlier:
                results["earlier_settings"] = self._earlier
            _fill_in(results)
            if results["diverged_epoch"] is None and not _is_finite(results["final"]):
                results["diverged_epoch"] = results["epochs"] - 1
        arrays = _arrays(trainer)
        results |= _from_arrays(arrays)
        self._failed = _failed(results)
        if self._folder is not None:
            _keep_earlier(self._folder / name, results)
            # Results last: a run that has them has finished.
            if arrays:
                path = self._folder / name.replace("results", "examples")
                write_arrays(path.with_suffix(".npz"), arrays)
            write_json(self._folder / name, results)
        with warn_on_failure("print the table of results"):
            self._table = summary_table(results, folder=self._folder and shown(self._folder))
        for logger in trainer.loggers if self._table and trainer.state.fn == "fit" else []:
            if isinstance(logger, WandbLogger):
                with warn_on_failure("log the table of results to Weights & Biases"):
                    log_summary(logger, self._table, max(trainer.current_epoch - 1, 0))

    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        data, seed = datamodule_of(trainer), os.environ.get("PL_GLOBAL_SEED")
        indices: Any = getattr(data, "split_indices", None)
        return {
            "method": self.method or type(pl_module).__name__,
            "model": type(pl_module).__name__,
            "data": None if data is None else type(data).__name__,
            "num_classes": getattr(data, "num_classes", None),
            "seed": None if seed is None else int(seed),
            "settings": dict(pl_module.hparams) if self.settings is None else self.settings,
            "versions": versions(),
            "hardware": hardware(trainer.world_size),
            "split_indices": indices() if takes(indices) else None,
        }


def _gather(trainer: Trainer) -> dict[str, dict[str, Any]]:
    parts = ("final", "early_stopped", "num_examples")
    measured: dict[str, dict[str, Any]] = {part: {} for part in (*parts, "attacks")}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        results = getattr(callback, "final_results", None) or {}
        for part in parts:
            measured[part] |= results.get(part) or {}
        if isinstance(callback, AutoAttack):
            measured["attacks"] |= callback.attacks
    return measured


def _arrays(trainer: Trainer) -> dict[str, Any]:
    """The values of each example, so that reports need nothing else."""
    arrays: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        tensors = getattr(callback, "final_arrays", None) or {}
        arrays |= {name: values.cpu().numpy() for name, values in tensors.items()}
    return arrays


def _from_arrays(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Checks, curve and errors of classes, of final and early-stopped weights, if measured."""
    rules = {"checks": attack_checks, "error_curve": error_curve, "class_errors": class_errors}
    entries: dict[str, dict[str, Any]] = {}
    for weights in ("final", "early_stopped"):
        names = [name for name in arrays if name.startswith(f"{weights}/")]
        own = {name.removeprefix(f"{weights}/"): arrays[name] for name in names}
        for entry, rule in rules.items():
            if value := rule(own):
                entries.setdefault(entry, {})[weights] = value
    return entries


def _failed(results: Mapping[str, Any]) -> list[str]:
    """A line for each failed check; the weights are named if only one of both fails it."""
    failed: dict[str, list[str]] = {}
    for weights, checks in results.get("checks", {}).items():
        for check in checks:
            if check["passed"] is False:
                failed.setdefault(check["text"], []).append(weights)
    return [
        f"Check failed ({' and '.join(names).replace('_', '-')} weights): {text}."
        for text, names in failed.items()
    ]


def _rows(trainer: Trainer) -> list[dict[str, float]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Trajectory):
            return callback.rows
    tables = (logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger))
    return next((table.rows for table in tables), [])


def _is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether the measured network was finite; perturbed weights may overflow although it is."""
    losses = [metrics[name] for name in LOSSES.values() if name in metrics]
    flatness = [value for name, value in metrics.items() if name.startswith("flatness/")]
    return all(map(math.isfinite, losses or flatness))


def _add_logged(final: dict[str, Any], trainer: Trainer) -> None:
    """Adds what other callbacks and `test_step` logged in `test`, of the tested weights."""
    for name, value in trainer.callback_metrics.items():
        if not name.startswith("early_stopped/") and not name.endswith("_early_stopped"):
            final.setdefault(name, float(value))


def _keep_earlier(path: Path, results: Mapping[str, Any]) -> None:
    """Renames results of an earlier test that has metrics which this one lacks."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["final"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if path.stem == "results" or not earlier.keys() - results["final"].keys():
        return
    number = next(n for n in count(1) if not path.with_stem(f"{path.stem}-{n}").exists())
    examples = path.with_name(f"{path.stem.replace('results', 'examples')}.npz")
    for file in (examples, path):
        if file.is_file():
            file.rename(file.with_stem(f"{file.stem}-{number}"))


def _fill_in(results: dict[str, Any]) -> None:
    epochs = {"final": results["epochs"] - 1, "early_stopped": results["early_stopped_epoch"]}
    rows = {row["epoch"]: row for row in results["trajectory"]}
    for part, epoch in epochs.items():
        row = rows.get(epoch, {})
        # A standard error or the loss of correct examples belongs to the measurement of its value.
        own = tuple(f"{name}_" for name in results[part])
        # Metrics of a split, not such as a learning rate.
        logged = {k: v for k, v in row.items() if metric(k).split and not k.startswith(own)}
        results[part] = logged | results[part]
