"""Finished runs, read from their folders alone, so that copied folders work as well.

Example:
    >>> runs, left_out = find_runs("runs")  # doctest: +SKIP
    >>> runs[0].final["test/robust_loss"]  # doctest: +SKIP
    1.43
"""

import csv
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from robust_flatness.run_folder.files import Landscape, read_landscapes
from robust_flatness.run_folder.metrics import LOSSES, Weights, attacks_name, with_attacks

Metrics = Mapping[str, float]
_Checks = Mapping[str, list[dict[str, Any]]]

_RESULTS, _CONFIG, _METRICS = "results.json", "config.yaml", "metrics.csv"
# What `test` measured on the last checkpoint later, such as further extras.
_TESTED = "results_test.json"
# Settings that a test must share with its run, beside those of the final evaluation.
_PROTOCOL = [
    f"{part}.{name}" for part in ("data.init_args", "autoattack") for name in ("eps", "norm")
]
_NO_PROTOCOL = ("extras", "splits", "num_examples", "num_flatness_examples")
# Settings of the data that change no image that is measured, or are compared by `_data`.
_FREE = (".root", ".num_workers", ".in_memory", ".batch_size", ".num_test", ".num_train_eval")
_EARLY_STOPPED = "_early_stopped"
# Classes of runs in older formats, which do not state them.
_CLASSES = {"Digits": 10, "CIFAR10": 10, "CIFAR100": 100}
# The square of a larger number may not be finite.
_HUGE = 1e100
# Shares of images; an error of someone else's module may be a distance.
_ERRORS = ("error", "robust_error", "autoattack_error")
# Entries that a report needs. Older formats lack some of them.
_NEEDED = ("method", "data", "settings", "final", "early_stopped", "trajectory", "epochs")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run folder.
        method: Name of what was trained, such as `at_awp`.
        data: Class of the data, such as `Digits`; of an `ImageFolder`, the name of its folder.
        seed: Seed of the run, if it had one.
        settings: All settings as nested mappings, as in `config.yaml`.
        final: Finite metrics of the last weights by name; errors are shares of 1. An error by other
            attacks than AutoAttack `standard` has their names: `test/apgd-ce+apgd-t_error`.
        early_stopped: The same of the early-stopped weights.
        num_examples: Number of images that a metric was measured on, by name.
        trajectory: A row for each epoch, with `epoch` and finite metrics by name.
        early_stopped_epoch: Epoch of the early-stopped weights, from 0.
        diverged_epoch: First epoch, from 0, at which the network was not finite.
        earlier_settings: Of parts of a resumed run that had others: `settings`, and `before_epoch`,
            the first epoch (from 0) with later ones.
        epochs: Number of epochs trained, at least 1.
        wall_time_seconds: Of training with all its measures.
        num_classes: Number K of classes, if known.
        versions: Of the packages that ran.
        hardware: Of the machine.
        checks: By weights, mappings with `name`, `passed` (None if not decided) and `text`.
        error_curve: By weights, `eps` and the `robust_error` at each.
        class_errors: By weights and split, the robust error of each class.
        landscapes: By name, such as `final/random`, as means over examples: `(D, S, 1)`.
    """

    folder: Path
    method: str
    data: str
    seed: int | None
    settings: Mapping[str, Any]
    final: Metrics
    early_stopped: Metrics
    num_examples: Mapping[str, int]
    trajectory: Sequence[Metrics]
    early_stopped_epoch: int | None
    epochs: int
    wall_time_seconds: float
    num_classes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    diverged_epoch: int | None = None
    earlier_settings: Sequence[Mapping[str, Any]] = field(default_factory=list)
    checks: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    error_curve: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    class_errors: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    landscapes: Mapping[str, Landscape] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    def metrics(self, weights: Weights = "final") -> Metrics:
        """Metrics of the last or of the early-stopped weights."""
        return self.final if weights == "final" else self.early_stopped


class LeftOut(NamedTuple):
    """A folder that cannot be used, and why, in words that follow "left out:"."""

    folder: Path
    reason: str


def check_root(root: str | Path) -> None:
    """Raises if a folder of runs does not exist."""
    if not Path(root).is_dir():
        raise ValueError(f"Expected `runs` to be a folder with run folders but got {root}.")


def find_runs(root: str | Path) -> tuple[list[Run], list[LeftOut]]:
    """Reads all runs below a folder, or in it, sorted by path.

    Returns:
        The finished runs; and folders of runs that are not finished or are broken, and tests that
        do not fit their run.

    Raises:
        ValueError: If `root` is not a folder.
    """
    root = Path(root)
    check_root(root)
    folders, seen = [], set()
    for name, subfolders, files in os.walk(root, followlinks=True):
        # A link may lead back to a folder above it.
        if (real := os.path.realpath(name)) in seen:
            subfolders.clear()
        elif not {_RESULTS, _CONFIG, _TESTED}.isdisjoint(files):
            folders.append(Path(name))
        seen.add(real)
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for folder in sorted(folders):
        # W&B has a config.yaml of its own inside run folders.
        if "wandb" in folder.relative_to(root).parts:
            continue
        try:
            run, unused = _load_run(folder)
            runs.append(run)
            left_out += unused
        except (ValueError, OSError) as error:
            left_out.append(LeftOut(folder, str(error)))
    return runs, left_out


def load_run(folder: str | Path) -> Run:
    """Reads the run in a run folder.

    A test of `last.ckpt`, `results_test.json`, adds the measures that `results.json` lacks, if it
    has the same weights, threat model and protocol of the final evaluation.

    Raises:
        ValueError: If the run has not finished, is broken or lacks entries. The message is the
            reason.
    """
    return _load_run(Path(folder))[0]


def _load_run(folder: Path) -> tuple[Run, list[LeftOut]]:
    """A run, and its test if that cannot be used."""
    path = folder / _RESULTS
    if not path.is_file():
        raise ValueError(_progress(folder))
    content = _read_json(path)
    missing = [name for name in _NEEDED if content.get(name) is None]
    if missing:
        raise ValueError(f"{_RESULTS} is of an older format, without {', '.join(missing)}")
    try:
        _check_values(content)
        run = _parse(folder, content)
    except ValueError as error:
        raise ValueError(f"{_RESULTS} is of another format ({error})") from error
    unused, landscapes = [], ["landscapes.npz"]
    for test in _tests(folder):
        try:
            content = _with_tested(content, _read_json(test))
            run = _parse(folder, content)
            landscapes.append(f"{test.stem.replace('results', 'landscapes')}.npz")
        except (ValueError, OSError) as error:
            unused.append(LeftOut(test, str(error)))
    return replace(run, landscapes=_landscapes(folder, landscapes)), unused


def _tests(folder: Path) -> list[Path]:
    """Results of tests of `last.ckpt`, the latest first: without a number, then by number."""
    earlier = folder.glob(_TESTED.replace(".", "-*."))
    numbers = {int(n[1]): p for p in earlier if (n := re.search(r"-(\d+)$", p.stem))}
    files = [folder / _TESTED, *(numbers[n] for n in sorted(numbers, reverse=True))]
    return [path for path in files if path.is_file()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is broken ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is of another format (a {type(content).__name__})")
    return content


def _with_tested(content: dict[str, Any], tested: dict[str, Any]) -> dict[str, Any]:
    """The results of `fit`, with the measures of `test` that they lack.

    Raises:
        ValueError: If the test is of other weights or another protocol, or has another format.
    """
    _check_values(tested)
    if tested.get("checkpoint") != "last" or tested.get("trajectory") != content["trajectory"]:
        raise ValueError("is not a test of the last checkpoint of this training")
    others = [name for name in _PROTOCOL if _setting(tested, name) != _setting(content, name)]
    others += ["data"] if "data" in tested and _data(tested) != _data(content) else []
    for name in ("data", "model"):
        others += _other_settings(_setting(tested, name) or {}, _setting(content, name) or {}, name)
    if _final_settings(tested) != _final_settings(content):
        others.append("final")
    if others:
        names = ", ".join(dict.fromkeys(others))
        raise ValueError(f"has other settings than the run: {names}")
    parts = ("final", "early_stopped")
    theirs, ours = _mapping(tested, "num_examples"), _mapping(content, "num_examples")
    measured = {name for part in parts for name in _mapping(content, part)}
    measured |= {name.removesuffix(_EARLY_STOPPED) for name in measured}
    # Without a number of images, a value is one of the trajectory.
    taken = {name for part in parts for name in _mapping(tested, part) if name not in measured}
    taken |= {name for name in theirs if name not in ours}
    # A standard error is of the same measurement as its value.
    parts_of = tuple(f"{name}_" for name in taken)
    both = dict(content)
    for part in (*parts, "num_examples", "attacks"):
        own = _attacks(content) if part == "attacks" else _mapping(content, part)
        new = _mapping(tested, part)
        both[part] = {
            name: value
            for name, value in own.items()
            if name not in taken and (name in ours or not name.startswith(parts_of))
        }
        both[part] |= {name: value for name, value in new.items() if name in taken}
    for name in ("error_curve", "class_errors"):
        both[name] = _mapping(tested, name) | _mapping(content, name)
    both["checks"] = _merged_checks(_checks(content), _checks(tested))
    return both


def _earlier_settings(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = _entry(content, "earlier_settings", lambda x: isinstance(x, list), "a list") or []
    if not all(isinstance(part, dict) and isinstance(part.get("settings"), dict) for part in parts):
        raise ValueError("`earlier_settings` is not a list of settings")
    return list(parts)


def _data(content: Mapping[str, Any]) -> str:
    """The class of the data, or the name of the folder with the images: each is a data set."""
    data, root = _text(content, "data"), _setting(content, "data.init_args.root")
    folder = Path(root).name if isinstance(root, str) else ""
    is_name = data == "ImageFolder" and 0 < len(folder) < 256 and folder.isprintable()
    return folder if is_name and folder not in _CLASSES else data


def _setting(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content.get("settings")
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _other_settings(theirs: Any, ours: Any, name: str) -> list[str]:
    """Settings that both state and that differ; newer versions have more settings."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return [name] if theirs != ours and not name.endswith(_FREE) else []
    common = [key for key in ours if key in theirs]
    return [n for key in common for n in _other_settings(theirs[key], ours[key], f"{name}.{key}")]


def _final_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of the final evaluation, without what is measured and on how many images."""
    settings = _setting(content, "final")
    settings = settings if isinstance(settings, dict) else {}
    return {name: value for name, value in settings.items() if name not in _NO_PROTOCOL}


def _merged_checks(ours: _Checks, theirs: _Checks) -> dict[str, list[dict[str, Any]]]:
    """Checks by weights; one that `ours` could not decide is taken from `theirs`."""
    merged = {}
    for weights in {**theirs, **ours}:
        named = {check["name"]: check for check in ours.get(weights, ())}
        for check in theirs.get(weights, ()):
            if named.get(check["name"], {}).get("passed") is None:
                named[check["name"]] = check
        merged[weights] = list(named.values())
    return merged


def _parse(folder: Path, content: Mapping[str, Any]) -> Run:
    final, data = _finite(_mapping(content, "final"), "final"), _data(content)
    hardware, counts = _mapping(content, "hardware"), _mapping(content, "num_examples")
    if not isinstance(hardware.get("gpus") or [], list):
        raise ValueError("`hardware` holds no list of `gpus`")
    rows = content["trajectory"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("`trajectory` is not a list of mappings")
    if any(_count(row, "epoch") is None for row in rows):
        raise ValueError("a row of its trajectory has no epoch")
    # AutoAttack logs the error of the early-stopped weights beside that of the last ones.
    suffix = _EARLY_STOPPED
    logged = {n.removesuffix(suffix): x for n, x in final.items() if n.endswith(suffix)}
    stopped = logged | _finite(_mapping(content, "early_stopped"), "early_stopped")
    attacks = _attacks(content)
    images = {n: x for n in counts if (x := _count(counts, n, low=1)) is not None}
    time = "wall_time_seconds"
    seconds = _entry(content, time, lambda x: is_number(x) and x >= 0, "a number >= 0")
    return Run(
        folder=folder,
        method=_text(content, "method"),
        data=data,
        seed=_count(content, "seed"),
        settings=_mapping(content, "settings"),
        final=with_attacks(final, attacks),
        early_stopped=with_attacks(stopped, attacks),
        num_examples=with_attacks(images, attacks),
        trajectory=[_finite(row, "trajectory") for row in rows],
        early_stopped_epoch=_count(content, "early_stopped_epoch"),
        # A run may end within its first epoch; shares of training divide by this number.
        epochs=max(1, _count(content, "epochs") or 0),
        wall_time_seconds=math.nan if seconds in (None, math.inf) else float(seconds),
        num_classes=_count(content, "num_classes", low=1) or _CLASSES.get(data),
        versions=_mapping(content, "versions"),
        hardware=hardware,
        diverged_epoch=_count(content, "diverged_epoch"),
        earlier_settings=_earlier_settings(content),
        checks=_checks(content),
        error_curve=_lists(content, "error_curve"),
        class_errors=_lists(content, "class_errors"),
    )


def _attacks(content: Mapping[str, Any]) -> dict[str, str]:
    """The attacks of AutoAttack by metric; older formats have them in the settings alone."""

    def are_names(attacks: Any) -> bool:
        return isinstance(attacks, dict) and all(isinstance(name, str) for name in attacks.values())

    if "attacks" in content:
        return dict(_entry(content, "attacks", are_names, "a mapping of names") or {})
    own = _mapping(content, "settings").get("autoattack")
    version, attacks = (
        own.get(x) if isinstance(own, dict) else None for x in ("version", "attacks")
    )
    if not isinstance(attacks, list) or not all(isinstance(attack, str) for attack in attacks):
        attacks = None
    name = attacks_name("custom" if attacks else str(version or "standard"), attacks)
    return {f"{split}/autoattack_error": name or "autoattack" for split in LOSSES}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _landscapes(folder: Path, names: Sequence[str]) -> dict[str, Landscape]:
    """Landscapes in the first of these files that exists, averaged over examples."""
    for name in names:
        if (path := folder / name).is_file():
            try:
                landscapes = read_landscapes(path)[0]
            except Exception as error:  # a damaged file raises almost anything
                raise ValueError(f"{name} is broken or not of landscapes ({error})") from error
            # A study's landscapes of each example take gigabytes.
            return {
                key: Landscape(measured.coordinates, measured.curves[..., None])
                for key, measured in landscapes.items()
            }
    return {}


def _progress(folder: Path) -> str:
    """What a folder has instead of results: how many epochs were recorded, or a test."""
    path, epochs = folder / _METRICS, 0
    if _tests(folder) and not path.exists():
        return "has a test and no training"
    with suppress(OSError, ValueError, csv.Error):
        if path.is_file():  # opening a FIFO would block
            with path.open(newline="", encoding="utf-8") as file:
                epochs = sum(1 for _ in csv.DictReader(file))
    counted = {0: "no epoch was", 1: "one epoch was"}.get(epochs, f"{epochs} epochs were")
    return f"not finished: {counted} recorded"


def _check_values(value: Any, depth: int = 40) -> None:
    """Refuses values that no table or page can show, at any depth."""
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError("mappings or lists are nested too deeply")
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(inner, depth - 1)
    elif isinstance(value, str):
        value.encode()  # fails for a lone surrogate
    elif isinstance(value, int) and abs(value) > 2**63:
        raise ValueError("a number has too many digits")


def _entry(
    content: Mapping[str, Any], name: str, is_valid: Callable[[Any], bool], expected: str
) -> Any:
    value = content.get(name)
    if value is not None and not is_valid(value):
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, not {expected}")
    return value


def _text(content: Mapping[str, Any], name: str) -> str:
    def is_name(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable() and 0 < len(value) < 256

    return str(_entry(content, name, is_name, "a name in one line"))


def _count(content: Mapping[str, Any], name: str, low: int = 0) -> int | None:
    expected = f"an integer >= {low}"
    value: int | None = _entry(content, name, lambda x: type(x) is int and x >= low, expected)
    return value


def _mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(_entry(content, name, lambda x: isinstance(x, dict), "a mapping") or {})


def _checks(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    def is_check(check: Any) -> bool:
        texts = (
            [check.get(name) for name in ("name", "text")] if isinstance(check, dict) else [None]
        )
        return all(isinstance(text, str) for text in texts)

    def are_checks(weights: Any) -> bool:
        return all(isinstance(own, list) and all(map(is_check, own)) for own in weights.values())

    checks = _mapping(content, "checks")
    return dict(_entry({"checks": checks}, "checks", are_checks, "lists of `name` and `text`"))


def _lists(content: Mapping[str, Any], name: str) -> dict[str, dict[str, list[float]]]:
    def is_entry(value: Any) -> bool:
        # JSON has no NaN, which is the error of a class without images.
        return is_number(value) or (value is None and name == "class_errors")

    def are_lists(weights: Any) -> bool:
        for lists in weights.values():
            values = list(lists.values()) if isinstance(lists, dict) else [lists]
            if not all(isinstance(one, list) and all(map(is_entry, one)) for one in values):
                return False
            # The points of a curve have both coordinates.
            if name == "error_curve" and len({len(one) for one in values}) > 1:
                return False
        return True

    lists = _mapping(content, name)
    _entry({name: lists}, name, are_lists, "mappings of lists of numbers")
    return {
        weights: {
            key: [math.nan if value is None else value for value in values]
            for key, values in own.items()
        }
        for weights, own in lists.items()
    }


def _finite(metrics: Mapping[str, Any], where: str) -> dict[str, float]:
    """The finite numbers. An error of ours that is not a share of 1 is refused, others left out."""
    finite = {
        name: float(value)
        for name, value in metrics.items()
        if is_number(value) and abs(value) < _HUGE
    }
    others = []
    for name, value in finite.items():
        # The difference of two shares may be negative.
        low = -1 if "gap/" in name else 0
        if "error" in name and not low <= value <= 1:
            if name.rsplit("/", 1)[-1].removesuffix(_EARLY_STOPPED) in _ERRORS:
                raise ValueError(f"`{where}` has {name} {value:g}, not a share of 1")
            others.append(name)
    return {name: value for name, value in finite.items() if name not in others}
