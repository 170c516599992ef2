"""Runs that differ in their seed alone are one model: a row of a table, a point of a figure."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from robust_flatness.reporting.runs import Run, Weights

# Settings that do not change what is trained or measured.
_PLACE = {"seed_everything", "default_root_dir", "project", "group", "name", "ckpt_path", "config"}
_HARDWARE = {"accelerator", "devices", "strategy", "num_nodes", "num_workers", "in_memory"}
_LOOK = {"logger", "callbacks", "without", "enable_progress_bar", "log_every_n_steps"}
_IGNORED = _PLACE | _HARDWARE | _LOOK


class Point(Protocol):
    """A model that a table has a row for, whether we trained it or a paper did."""

    @property
    def method(self) -> str:
        """Its method, such as `trades`: what a legend names and a colour stands for."""

    @property
    def label(self) -> str:
        """Its name among all models, such as `TRADES lam=9`."""

    def mean(self, name: str, weights: Weights = "final") -> float | None:
        """A figure, the mean over seeds; None where it was not measured."""


@dataclass(frozen=True)
class Model:
    """Runs of one method at the same settings, with seeds as replicas.

    Attributes:
        method: Name of the method, such as `trades`.
        label: Name among all models: the method's, and the settings that tell models of one method
            apart.
        runs: In the order of their seeds.
        differs: Those settings, by their names on the command line.
    """

    method: str
    label: str
    runs: tuple[Run, ...]
    differs: Mapping[str, Any]

    def values(self, name: str, weights: Weights = "final") -> list[float]:
        """A figure of each run that has it."""
        found = (run.figures(weights).get(name) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, name: str, weights: Weights = "final") -> float | None:
        """The mean over seeds, None where no run has the figure."""
        values = self.values(name, weights)
        return statistics.fmean(values) if values else None

    def deviation(self, name: str, weights: Weights = "final") -> float | None:
        """The standard deviation over seeds, None for fewer than two."""
        values = self.values(name, weights)
        return statistics.stdev(values) if len(values) > 1 else None


def group_models(runs: Iterable[Run]) -> list[Model]:
    """Groups runs by method and settings.

    Args:
        runs: Of one data set.

    Returns:
        Models, sorted by method and label.

    Example:
        >>> from pathlib import Path
        >>> given = {"data": "Digits", "final": {}, "early_stopped": {}, "num_examples": {}}
        >>> given |= {"trajectory": [], "early_stopped_epoch": None, "epochs": 1}
        >>> def run(seed, lam):
        ...     settings = {"seed_everything": seed, "model": {"init_args": {"lam": lam}}}
        ...     rest = {"wall_time_seconds": 1.0, "settings": settings, **given}
        ...     return Run(folder=Path("runs"), method="trades", seed=seed, **rest)
        >>> [model.label for model in group_models([run(0, 6.0), run(1, 6.0), run(0, 9.0)])]
        ['TRADES lam=6', 'TRADES lam=9']
    """
    grouped: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        same = grouped.setdefault(run.method, {}).setdefault(_fingerprint(run), [])
        same.append(run)
    models = [
        Model(
            method,
            _label(method, differs),
            tuple(sorted(same, key=lambda run: (run.seed is None, run.seed or 0, run.name))),
            differs,
        )
        for method, by_settings in grouped.items()
        for differs, same in zip(_differences(list(by_settings.values())), by_settings.values())
    ]
    return sorted(models, key=lambda model: (model.method, _natural(model.differs), model.label))


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line, without those of place, hardware and look.

    Args:
        settings: Nested, as in `config.yaml`.
        prefix: Name of the mapping that holds them.

    Example:
        >>> flat_settings({"model": {"class_path": "pkg.AT", "init_args": {"eps": 0.2}}})
        {'model': 'AT', 'model.eps': 0.2}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _IGNORED:
            continue
        if key == "class_path":
            flat[prefix.rstrip(".")] = str(value).rsplit(".", 1)[-1]
        elif isinstance(value, Mapping):
            flat |= flat_settings(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _fingerprint(run: Run) -> str:
    return json.dumps(flat_settings(run.settings), sort_keys=True, default=str)


def _differences(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """For each group, the settings that are not the same in all groups."""
    flat = [flat_settings(group[0].settings) for group in groups]
    names = sorted({name for settings in flat for name in settings})
    apart = [name for name in names if len({str(settings.get(name)) for settings in flat}) > 1]
    return [{name: settings.get(name) for name in apart} for settings in flat]


def _label(method: str, differs: Mapping[str, Any]) -> str:
    shown = [f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in differs.items()]
    return " ".join([method_label(method), *shown])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _natural(differs: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    return [
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for value in differs.values()
    ]


# As the paper writes them. Methods of other names are shown as they are named.
METHOD_LABELS = {
    "at": "AT",
    "at_awp": "AT-AWP",
    "autoaugment": "AutoAugment",
    "cyclic": "Cyclic",
    "entropy_sgd": "Entropy-SGD",
    "gelu": "GeLU",
    "label_noise": "Label noise",
    "label_smoothing": "Label smoothing",
    "larger_eps": "Larger ε",
    "late_multi_step": "“Late” multi-step",
    "mart": "MART",
    "mish": "MiSH",
    "self_supervision": "Self-supervision",
    "silu": "SiLU",
    "trades": "TRADES",
    "unlabeled": "+Unlabeled",
    "weight_averaging": "Weight averaging",
    "weight_clipping": "Weight clipping",
    "weight_decay": "Weight decay",
}


def method_label(method: str) -> str:
    """A method's name as the paper writes it.

    Example:
        >>> method_label("at_awp"), method_label("my_method")
        ('AT-AWP', 'my_method')
    """
    return METHOD_LABELS.get(method, method)
