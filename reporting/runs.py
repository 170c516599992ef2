"""Finished runs, read from their folders alone, so that folders copied from a cluster will do.

Example:
    >>> runs, left_out = read_runs("runs")  # doctest: +SKIP
    >>> runs[0].final["test/robust_loss"]  # doctest: +SKIP
    1.43
"""

import csv
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from robust_flatness.run_folder.landscape_file import Landscape, read_landscapes

Weights = Literal["final", "early_stopped"]
Figures = Mapping[str, float]

_LOGGED = "_early_stopped"
_RESULTS, _CONFIG, _METRICS = "results.json", "config.yaml", "metrics.csv"
# What runs on these do not say themselves in older formats.
_CLASSES = {"Digits": 10, "CIFAR10": 10, "CIFAR100": 100}
# Squares of such figures would not be finite either.
_HUGE = 1e100
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
                except Exception as error:  # a damaged file raises almost anything
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_RESULTS} is broken ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{_RESULTS} is of another format (a {type(content).__name__})")
    missing = [name for name in _NEEDED if content.get(name) is None]
    if missing:
        raise ValueError(f"{_RESULTS} is of an older format, without {', '.join(missing)}")
    try:
        _check_values(content)
        run = Run(
            folder=folder,
            method=_text(content, "method"),
            data=_text(content, "data"),
            seed=_count(content, "seed"),
            settings=_mapping(content, "settings"),
            final=_finite(_mapping(content, "final"), "final"),
            early_stopped=_early_stopped(content),
            num_examples=_counts(content, "num_examples"),
            trajectory=_rows(content["trajectory"]),
            early_stopped_epoch=_count(content, "early_stopped_epoch"),
            # A run that ends within its first epoch counts as one: shares of training divide by it.
            epochs=max(1, _count(content, "epochs") or 0),
            wall_time_seconds=_seconds(content, "wall_time_seconds"),
            num_classes=_count(content, "num_classes", low=1)
            or _CLASSES.get(_text(content, "data")),
            versions=_mapping(content, "versions"),
            hardware=_hardware(content),
            diverged_epoch=_count(content, "diverged_epoch"),
        )
    except ValueError as error:
        raise ValueError(f"{_RESULTS} is of another format ({error})") from error
    run.landscapes()  # a broken file is found here, and not in the middle of a report
    return run


def _early_stopped(content: Mapping[str, Any]) -> dict[str, float]:
    """With those figures that callbacks log beside the ones of the last weights."""
    logged = {
        name.removesuffix(_LOGGED): value
        for name, value in _mapping(content, "final").items()
        if name.endswith(_LOGGED)
    }
    own = _mapping(content, "early_stopped")
    return _finite(logged, "final") | _finite(own, "early_stopped")


def _rows(trajectory: Any) -> list[dict[str, float]]:
    if not isinstance(trajectory, list) or not all(isinstance(row, dict) for row in trajectory):
        raise ValueError("`trajectory` is no list of mappings")
    if any(_count(row, "epoch") is None for row in trajectory):
        raise ValueError("a row of its trajectory has no epoch")
    return [_finite(row, "trajectory") for row in trajectory]


def _check_values(value: Any, depth: int = 40) -> None:
    """Refuses what no table or page could hold, wherever it is."""
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError("mappings or lists are nested too deeply")
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(inner, depth - 1)
    elif isinstance(value, str):
        value.encode()  # half of a pair of surrogates is no text
    elif isinstance(value, int) and abs(value) > 2**63:
        raise ValueError("a number has too many digits")


def _text(content: Mapping[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) < 256:
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, no name in one line")
    return value


def _count(content: Mapping[str, Any], name: str, low: int = 0) -> int | None:
    value = content.get(name)
    if value is not None and (type(value) is not int or value < low):
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, no integer >= {low}")
    return value


def _counts(content: Mapping[str, Any], name: str) -> dict[str, int]:
    counts = _mapping(content, name)
    return {key: count for key in counts if (count := _count(counts, key, low=1)) is not None}


def _mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, no mapping")
    return value or {}


def _seconds(content: Mapping[str, Any], name: str) -> float:
    value = content.get(name)
    if value is None:
        return math.nan
    if not is_number(value) or not value >= 0:
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, no number >= 0")
    return float(value) if math.isfinite(value) else math.nan


def _hardware(content: Mapping[str, Any]) -> dict[str, Any]:
    hardware = _mapping(content, "hardware")
    if not isinstance(hardware.get("gpus") or [], list):
        raise ValueError("`hardware` holds no list of `gpus`")
    return hardware


def _folders(root: Path) -> list[Path]:
    """Folders that hold a run's config or results, the root included."""
    found = {path.parent for name in (_RESULTS, _CONFIG) for path in root.rglob(name)}
    # W&B keeps a config.yaml of its own inside run folders.
    return sorted(folder for folder in found if "wandb" not in folder.relative_to(root).parts)


def _unfinished(folder: Path) -> str:
    """How far a run came that has no results."""
    path, epochs = folder / _METRICS, 0
    with suppress(OSError, ValueError, csv.Error):
        if path.is_file():  # a FIFO would wait for a writer for ever
            with path.open(newline="", encoding="utf-8") as file:
                epochs = sum(1 for _ in csv.DictReader(file))
    if epochs < 2:
        return f"not finished: {'one' if epochs else 'no'} epoch was recorded"
    return f"not finished: {epochs} epochs were recorded"


def is_number(value: Any) -> bool:
    """Whether a value is a number; truth is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(figures: Mapping[str, Any], where: str) -> dict[str, float]:
    """Figures that are finite numbers; an error that is no share is a wrong number, not none."""
    finite = {
        name: float(value)
        for name, value in figures.items()
        if is_number(value) and abs(value) < _HUGE
    }
    for name, value in finite.items():
        # The difference of two shares may be negative.
        low = -1 if "gap/" in name else 0
        if "error" in name and not low <= value <= 1:
            raise ValueError(f"`{where}` has {name} {value:g}, no share of 1")
    return finite
