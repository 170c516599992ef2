"""Runs made by hand, in memory and as folders."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from robust_flatness.reporting.frame import Models, drop_duplicates, group_runs
from robust_flatness.run_folder.files import Landscape, write_landscapes
from robust_flatness.run_folder.runs import Metrics, Run, find_runs

# All that a run with the options of a study measures; `FINAL | {...}` changes some of it.
FINAL: dict[str, float] = {
    "test/error": 0.02,
    "test/robust_error": 0.52,
    "test/autoattack_error": 0.55,
    "test/robust_loss": 1.9,
    "test/robust_loss_correct": 1.75,
    "test/robust_loss_incorrect": 9.7,
    "train_eval/error": 0.0,
    "train_eval/robust_error": 0.06,
    "train_eval/robust_loss": 0.16,
    "flatness/average/test": 4.1,
    "flatness/average/test_sem": 0.2,
    "flatness/average/train": 4.8,
    "flatness/worst/test": 7.5,
    "flatness/clean_average/test": 0.9,
    "flatness/clean_worst/test": 2.5,
    "hessian/max_eigenvalue": 150.0,
    "hessian/min_eigenvalue": -12.0,
}
EARLY_STOPPED: dict[str, float] = {
    "test/error": 0.03,
    "test/robust_error": 0.48,
    "test/autoattack_error": 0.5,
    "test/robust_loss": 1.4,
    "train_eval/robust_error": 0.2,
    "train_eval/robust_loss": 0.5,
    "flatness/average/test": 2.2,
}


def make_run(
    method: str = "at",
    seed: int | None = 0,
    *,
    data: str = "Digits",
    final: Mapping[str, float] | None = None,
    early_stopped: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    trajectory: Sequence[Mapping[str, float]] | None = None,
    epochs: int = 4,
    folder: str | Path | None = None,
    num_examples: Mapping[str, int] | None = None,
    early_stopped_epoch: int | None = 2,
    wall_time_seconds: float = 68.0,
    num_classes: int | None = 10,
) -> Run:
    """A finished run. `final` and `early_stopped` replace all default metrics.

    Settings get the seed; the default trajectory overfits: test RLoss falls and rises again.
    """
    given = {"model": {"class_path": "robust_flatness.lightning_modules.AT", "init_args": {}}}
    final = dict(FINAL if final is None else final)
    return Run(
        folder=Path(folder or Path("runs") / f"{method}-{data}-s{seed}"),
        method=method,
        data=data,
        seed=seed,
        settings={"seed_everything": seed, **(given if settings is None else settings)},
        final=final,
        early_stopped=dict(EARLY_STOPPED if early_stopped is None else early_stopped),
        num_examples=dict(dict.fromkeys(final, 200) if num_examples is None else num_examples),
        trajectory=overfitting(epochs) if trajectory is None else list(trajectory),
        early_stopped_epoch=early_stopped_epoch,
        epochs=epochs,
        wall_time_seconds=wall_time_seconds,
        num_classes=num_classes,
        versions={"robust-flatness": "0.1.0"},
        hardware={"cpu_cores": 2},
    )


def overfitting(epochs: int) -> list[dict[str, float]]:
    """Rows of a run that overfits robustly, with every metric of a trajectory."""
    return [_row(epoch, epoch / max(1, epochs - 1)) for epoch in range(epochs)]


def write_run(
    folder: str | Path, run: Run, *, landscapes: Mapping[str, Landscape] | None = None
) -> Path:
    """Writes a run as the folder `folder`, as `fit` does; `load_run` reads it back equal."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["method", "data", "seed", "settings", "versions", "hardware", "wall_time_seconds"]
    names += ["final", "early_stopped", "num_examples", "early_stopped_epoch", "trajectory"]
    names += ["num_classes"]
    results = {name: getattr(run, name) for name in [*names, "epochs"]}
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(run.settings)), encoding="utf-8")
    write_metrics(folder, run.trajectory)
    if landscapes is not None:
        write_landscapes(folder / "landscapes.npz", landscapes, {})
    return folder


def make_models(*runs: Run) -> Models:
    return group_runs(drop_duplicates(runs)[0])


def read_models(root: str | Path) -> Models:
    return make_models(*find_runs(root)[0])


def write_metrics(folder: Path, rows: Sequence[Metrics]) -> None:
    """Writes `metrics.csv`, all that a run has before it ends beside its `config.yaml`."""
    names = sorted({name for row in rows for name in row} - {"epoch"})
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", *names])
        writer.writeheader()
        writer.writerows(rows)


def _row(epoch: int, progress: float) -> dict[str, float]:
    return {
        "epoch": epoch,
        "test/error": 0.4 - 0.38 * progress,
        "test/robust_error": 0.8 - 0.7 * progress + 0.45 * progress**2,
        "test/robust_loss": 2.3 - 2.4 * progress + 2.0 * progress**2,
        "test/robust_loss_correct": 2.1 - 2.4 * progress + 2.0 * progress**2,
        "test/robust_loss_incorrect": 3.0 + 6.7 * progress,
        "train_eval/robust_error": 0.8 - 0.74 * progress,
        "train_eval/robust_loss": 2.3 - 2.14 * progress,
        "flatness/average/test": 0.5 + 3.6 * progress,
        "flatness/average/test_sem": 0.1,
        "val/robust_error": 0.75 - 0.6 * progress + 0.4 * progress**2,
        "hessian/max_eigenvalue": 20.0 + 130.0 * progress,
    }
