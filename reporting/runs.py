"""Finished runs, read from their folders alone, so that folders copied from a cluster will do.

Example:
    >>> runs, left_out = read_runs("runs")  # doctest: +SKIP
    >>> runs[0].final["test/robust_loss"]  # doctest: +SKIP
    1.43
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

from robust_flatness.reporting.landscape_file import Landscape, read_landscapes

Weights = Literal["final", "early_stopped"]
Figures = Mapping[str, float]

_LOGGED = "_early_stopped"
_RESULTS, _CONFIG, _METRICS = "results.json", "config.yaml", "metrics.csv"
# What runs on these do not say themselves in older formats.
_CLASSES = {"Digits": 10, "CIFAR10": 10, "CIFAR100": 100}
# What a report cannot do without; older formats lack some of it.
_NEEDED = ("method", "data", "settings", "final", "early_stopped", "trajectory", "epochs")


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: The run folder.
        method: Name of what was trained, such as `at_awp`.
        data: Class of the data, such as `Digits`.
        seed: Seed of the run, if it had one.
        settings: All settings as nested mappings, as in `config.yaml`.
        final: Figures of the last weights by name (see the README), errors as shares, only finite
            ones.
        early_stopped: The same of the early-stopped weights.
        num_examples: Images that a figure was measured on.
        trajectory: A row an epoch, with `epoch` and figures by name, only finite ones.
        early_stopped_epoch: Epoch of the early-stopped weights, from 0.
        diverged_epoch: First epoch, from 0, whose network was measured as not finite.
        epochs: Epochs trained.
        wall_time_seconds: Of training with all its measures.
        num_classes: Number K of classes, where it is known.
        versions: Of the packages that ran.
        hardware: That it ran on.
    """

    folder: Path
    method: str
    data: str
    seed: int | None
    settings: Mapping[str, Any]
    final: Figures
    early_stopped: Figures
    num_examples: Mapping[str, int]
    trajectory: Sequence[Figures]
    early_stopped_epoch: int | None
    epochs: int
    wall_time_seconds: float
    num_classes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    diverged_epoch: int | None = None

    @property
    def name(self) -> str:
        """The folder's name, which tells runs apart."""
        return self.folder.name

    def figures(self, weights: Weights = "final") -> Figures:
        """Figures of the last or of the early-stopped weights."""
        return self.final if weights == "final" else self.early_stopped

    def landscapes(self) -> dict[str, Landscape]:
        """Landscapes by name, such as `final/random`; none where none was measured.

        Those of `fit` win over those that `test` measured later.

        Raises:
            ValueError: If the file is broken or not one of landscapes.
        """
        for name in ("landscapes.npz", "landscapes_test.npz"):
            path = self.folder / name
            if path.is_file():
                try:
                    return read_landscapes(path)[0]
                except (BadZipFile, EOFError, KeyError, ValueError) as error:
                    raise ValueError(f"{name} is broken or not of landscapes ({error})") from error
        return {}


class LeftOut(NamedTuple):
    """A folder that a report cannot use.

    Attributes:
        folder: The folder.
        reason: Why, in words that follow "left out:".
    """

    folder: Path
    reason: str


def read_runs(root: str | Path) -> tuple[list[Run], list[LeftOut]]:
    """Reads all runs below a folder, in the order of their names.

    Args:
        root: A folder that holds run folders at any depth, or is one.

    Returns:
        Runs that finished, and folders that hold something of a run but cannot be used.

    Raises:
        ValueError: If `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"Expected `runs` to be a folder with run folders but got {root}.")
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for folder in _folders(root):
        try:
            runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            left_out.append(LeftOut(folder, str(error)))
    return runs, left_out


def read_run(folder: Path) -> Run:
    """Reads one run.

    Args:
        folder: The run folder.

    Raises:
        ValueError: If the run has not finished, is broken or of a format that lacks what is needed,
            with the reason as its message.
    """
    path = folder / _RESULTS
    if not path.is_file():
        raise ValueError(_unfinished(folder))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_RESULTS} is broken ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{_RESULTS} is of another format (a {type(content).__name__})")
    missing = [name for name in _NEEDED if content.get(name) is None]
    if missing:
        raise ValueError(f"{_RESULTS} is of an older format, without {', '.join(missing)}")
    try:
        run = Run(
            folder=folder,
            method=str(content["method"]),
            data=str(content["data"]),
            seed=content.get("seed"),
            settings=dict(content["settings"]),
            final=_finite(content["final"]),
            early_stopped=_early_stopped(content),
            num_examples=dict(content.get("num_examples") or {}),
            trajectory=_rows(content["trajectory"]),
            early_stopped_epoch=content.get("early_stopped_epoch"),
            epochs=int(content["epochs"]),
            wall_time_seconds=float(content.get("wall_time_seconds") or math.nan),
            num_classes=content.get("num_classes") or _CLASSES.get(str(content["data"])),
            versions=dict(content.get("versions") or {}),
            hardware=dict(content.get("hardware") or {}),
            diverged_epoch=content.get("diverged_epoch"),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{_RESULTS} is of another format ({error})") from error
    run.landscapes()  # a broken file is found here, and not in the middle of a report
    return run


def _early_stopped(content: Mapping[str, Any]) -> dict[str, float]:
    """With those figures that callbacks log beside the ones of the last weights."""
    logged = {
        name.removesuffix(_LOGGED): value
        for name, value in content["final"].items()
        if name.endswith(_LOGGED)
    }
    return _finite(logged) | _finite(content["early_stopped"])


def _rows(trajectory: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    rows = [_finite(row) for row in trajectory]
    if any("epoch" not in row for row in rows):
        raise ValueError("a row of its trajectory has no epoch")
    return rows


def _folders(root: Path) -> list[Path]:
    """Folders that hold a run's config or results, the root included."""
    found = {path.parent for name in (_RESULTS, _CONFIG) for path in root.rglob(name)}
    # W&B keeps a config.yaml of its own inside run folders.
    return sorted(folder for folder in found if "wandb" not in folder.relative_to(root).parts)


def _unfinished(folder: Path) -> str:
    """How far a run came that has no results."""
    try:
        with (folder / _METRICS).open(newline="", encoding="utf-8") as file:
            epochs = sum(1 for _ in csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        epochs = 0
    if epochs < 2:
        return f"not finished: {'one' if epochs else 'no'} epoch was recorded"
    return f"not finished: {epochs} epochs were recorded"


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
