"""Runs that differ in their seed alone are one model: a row of a table, a point of a figure."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from robust_flatness.reporting.runs import LeftOut, Run, Weights

# Settings that do not change what is trained or measured, by their names on the command line.
_PLACE = {"seed_everything", "folder", "project", "group", "name", "ckpt_path", "weights_only"}
_PLACE |= {"config", "trainer.default_root_dir", "best_checkpoint.dirpath", "last_checkpoint"}
_HARDWARE = {"trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"}
_HARDWARE |= {"data.num_workers", "data.in_memory"}
_LOOK = {"without", "trainer.logger", "trainer.callbacks", "trainer.profiler"}
_LOOK |= {"trainer.enable_progress_bar", "trainer.enable_model_summary"}
_LOOK |= {"trainer.log_every_n_steps", "trajectory.figures"}
_IGNORED = _PLACE | _HARDWARE | _LOOK
# What is trained tells models apart better than how they were watched.
_SECTIONS = ("model", "data", "weight_averaging", "weight_clipping", "trainer")
_MOST_SHOWN = 3


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


def without_copies(runs: Iterable[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Leaves out runs that repeat another's method, data, settings and seed.

    The same seed again is no replica: counted as one, it would narrow the deviation over seeds.

    Args:
        runs: In any order. The first of each kind stays; runs without a seed all do.

    Returns:
        The runs that stay, and those left out.
    """
    first: dict[tuple[str, str, int], Run] = {}
    kept: list[Run] = []
    left_out: list[LeftOut] = []
    for run in runs:
        key = (run.method, _fingerprint(run), -1 if run.seed is None else run.seed)
        if run.seed is not None and key in first:
            reason = f"repeats {first[key].folder}: the same method, data, settings and seed"
            left_out.append(LeftOut(run.folder, reason))
        else:
            first[key] = run
            kept.append(run)
    return kept, left_out


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
        if f"{prefix}{key}" in _IGNORED:
            continue
        if key == "class_path":
            flat[prefix.rstrip(".")] = str(value).rsplit(".", 1)[-1]
        elif isinstance(value, Mapping):
            flat |= flat_settings(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat(run: Run) -> dict[str, Any]:
    """Settings that have a value: an option that an older version lacks is one that is not set."""
    flat = {"data": run.data} | flat_settings(run.settings)
    return {name: value for name, value in flat.items() if value is not None}


def _fingerprint(run: Run) -> str:
    flat = {name: _text(value) for name, value in _flat(run).items()}
    return json.dumps(flat, sort_keys=True)


def _models(method: str, groups: Sequence[Sequence[Run]]) -> list[Model]:
    differences = _differences(groups)
    labels = _labels(differences)
    return [
        Model(method, " ".join([method_label(method), *label]), tuple(_by_seed(runs)), differs)
        for runs, differs, label in zip(groups, differences, labels)
    ]


def _by_seed(runs: Iterable[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, run.name))


def _differences(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """For each group, the settings that are not the same in all groups."""
    flat = [_flat(group[0]) for group in groups]
    names = sorted({name for settings in flat for name in settings}, key=_by_section)
    apart = [name for name in names if len({_text(settings.get(name)) for settings in flat}) > 1]
    return [{name: settings.get(name) for name in apart} for settings in flat]


def _by_section(name: str) -> tuple[int, str]:
    section = name.split(".", 1)[0]
    return (_SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)), name


def _labels(differences: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each label shows: few settings, and more where few would not tell models apart."""
    shown = [_shown(differs) for differs in differences]
    most = max(map(len, shown))
    few = next(
        (n for n in range(_MOST_SHOWN, most) if _distinct(settings[:n] for settings in shown)),
        most,
    )
    return [settings[:few] + ["…"] * (len(settings) > few) for settings in shown]


def _shown(differs: Mapping[str, Any]) -> list[str]:
    """`lam=9`, and the same name and value once, as `eps` of model and data are one number."""
    return list(dict.fromkeys(f"{_name(name)}={_short(value)}" for name, value in differs.items()))


def _name(name: str) -> str:
    """Measures have settings of the same names, so that only what is trained is shown short."""
    return name.rsplit(".", 1)[-1] if _by_section(name)[0] < len(_SECTIONS) else name


def _distinct(items: Iterable[Sequence[str]]) -> bool:
    found = [tuple(item) for item in items]
    return len(set(found)) == len(found)


def _text(value: Any) -> str:
    """A value as text that is the same for 6 and 6.0."""
    return f"{value:.12g}" if _is_number(value) else str(value)


def _short(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _natural(differs: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    return [
        (0, float(value), "") if _is_number(value) else (1, 0.0, str(value))
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
    # Beyond Table 1, as sweeps and the paper's other models are called.
    "adam": "Adam",
    "attack_steps": "Attack steps",
    "batch_size": "Batch size",
    "constant_rate": "Constant learning rate",
    "dropout": "Dropout",
    "ignore_incorrect": "Ignore incorrect",
    "learning_rate": "Learning rate",
    "pgd_tau": "PGD-τ",
    "prevent_label_leaking": "Prevent label leaking",
}


def method_label(method: str) -> str:
    """A method's name as the paper writes it.

    Example:
        >>> method_label("at_awp"), method_label("my_method")
        ('AT-AWP', 'my_method')
    """
    return METHOD_LABELS.get(method, method)
