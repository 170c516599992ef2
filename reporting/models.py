"""Runs that differ in their seed alone are one model: a row of a table, a point of a figure."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from robust_flatness.plotting.method_labels import METHOD_LABELS
from robust_flatness.reporting.copies import without_copies
from robust_flatness.reporting.model_labels import model_labels, settings_texts
from robust_flatness.reporting.runs import Run, Weights, is_number
from robust_flatness.reporting.settings import exact_text, importance, set_values

_MOST_TOLD = 10  # settings, where there is room for a sentence


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
            apart, or a letter where these are many.
        runs: In the order of their seeds.
        differs: Those settings, by their names on the command line.
    """

    method: str
    label: str
    runs: tuple[Run, ...]
    differs: Mapping[str, Any]

    @property
    def untold(self) -> str:
        """The settings that differ, where the label has no room for them; else empty."""
        texts = settings_texts(self.differs)
        if not self.label.startswith(f"{method_label(self.method)} ("):
            return ""
        more = [f"{len(texts) - _MOST_TOLD} more"] if len(texts) > _MOST_TOLD else []
        return ", ".join([*texts[:_MOST_TOLD], *more])

    @property
    def diverged(self) -> str:
        """Its runs whose network became not finite, and from which epoch on; else empty."""
        return ", ".join(
            f"{run.name} (from epoch {run.diverged_epoch})"
            for run in self.runs
            if run.diverged_epoch is not None
        )

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
        runs: Of one data set. Copies of a run, as `without_copies` tells them, count once.

    Returns:
        Models, sorted by method and the settings that differ.

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
    for run in without_copies(runs)[0]:
        same = grouped.setdefault(run.method, {}).setdefault(_fingerprint(run), [])
        same.append(run)
    models = [
        model
        for method, by_settings in grouped.items()
        for model in _models(method, list(by_settings.values()))
    ]
    return sorted(models, key=lambda model: (model.method, _natural(model.differs), model.label))


def _fingerprint(run: Run) -> str:
    flat = {name: exact_text(value) for name, value in set_values(run).items()}
    return json.dumps(flat, sort_keys=True)


def _models(method: str, groups: Sequence[Sequence[Run]]) -> list[Model]:
    found = sorted(zip(_differences(groups), groups), key=lambda group: _natural(group[0]))
    labels = model_labels(method_label(method), [differs for differs, _ in found])
    return [
        Model(method, label, tuple(sorted(runs, key=_by_seed)), differs)
        for (differs, runs), label in zip(found, labels)
    ]


def _by_seed(run: Run) -> tuple[bool, int, str]:
    return run.seed is None, run.seed or 0, run.name


def _differences(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """For each group, the settings that are not the same in all groups."""
    flat = [set_values(group[0]) for group in groups]
    names = sorted({name for settings in flat for name in settings}, key=importance)
    apart = [n for n in names if len({exact_text(settings.get(n)) for settings in flat}) > 1]
    return [{name: settings.get(name) for name in apart} for settings in flat]


def _natural(differs: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    return [
        (0, float(value), "") if is_number(value) else (1, 0.0, str(value))
        for value in differs.values()
    ]


def method_label(method: str) -> str:
    """A method's name as the paper writes it.

    Example:
        >>> method_label("at_awp"), method_label("my_method")
        ('AT-AWP', 'my_method')
    """
    return METHOD_LABELS.get(method, method)
