"""Runs as pandas frames: one model for all runs that differ in their seed alone.

Example:
    >>> runs, left_out = find_runs("runs")  # doctest: +SKIP
    >>> models = group_runs(runs)  # doctest: +SKIP
    >>> models.points("flatness/average/test", "test/robust_loss")  # doctest: +SKIP
            method     x     y   dx   dy
    label
    AT          at  4.09  2.55  0.1  0.2
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd

from robust_flatness.run_folder.metrics import Weights, method_label, method_of
from robust_flatness.run_folder.runs import LeftOut, Metrics, Run, find_runs, is_number, load_run

WEIGHTS: tuple[Weights, Weights] = ("final", "early_stopped")

# Settings that change neither training nor measures, by their names on the command line.
_PLACE = {"seed_everything", "folder", "project", "group", "name", "ckpt_path", "weights_only"}
_PLACE |= {"config", "trainer.default_root_dir", "best_checkpoint.dirpath", "last_checkpoint"}
_HARDWARE = {"trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"}
_HARDWARE |= {"data.num_workers", "data.in_memory"}
_LOOK = {"without", "trainer.logger", "trainer.profiler"}
_LOOK |= {"trainer.enable_progress_bar", "trainer.enable_model_summary"}
_LOOK |= {"trainer.log_every_n_steps"}
# Callbacks of Lightning and of this package that show, write or measure.
_WATCHERS = {"DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary"}
_WATCHERS |= {"OnExceptionCheckpoint", "RichModelSummary", "RichProgressBar", "TQDMProgressBar"}
_WATCHERS |= {"LineProgressBar", "MeasuredCheckpoint", "ThroughputMonitor"}
_WATCHERS |= {"AutoAttack", "CatastrophicOverfitting", "Curvature", "EpochMeasure", "Results"}
_WATCHERS |= {"FinalEvaluation", "FinalMeasure", "Flatness", "Landscape", "RobustEvaluation"}
_WATCHERS |= {"Trajectory", "WorstCaseFlatness"}
# They add metrics or files, and change no metric of others.
_MORE = {"final.extras", "landscape", "catastrophic_overfitting", "trajectory", "log_checkpoints"}
_IGNORED = _PLACE | _HARDWARE | _LOOK | _MORE
# Data sets that are the same at any root.
_AT_ANY_ROOT = {"CIFAR10", "CIFAR100"}
# Defaults of arguments, of the model or of measures, that older runs lack.
_LATER = {"fast": True, "fold_batch_norm": False}
# Sections that only measure, and the images that they measure on.
_MEASURES = {"evaluation", "train_evaluation", "flatness", "train_flatness", "worst_flatness"}
_MEASURES |= {"early_stopping", "best_checkpoint", "final", "autoattack"}
_MEASURES |= {"curvature", "data.num_test", "data.num_train_eval"}
# What final values of all models of a report should have in common.
_COMPARED = ["data.downsample"] + [
    f"final.{name}" for name in ("eps", "norm", "steps", "step_size", "restarts", "protocol", "xi")
]
# Unlike the rest of its section, it ends training.
_TRAINING = {"early_stopping.patience"}
# Settings of training, which labels show first and without their section.
_SECTIONS = ("model", "data", "weight_averaging", "weight_clipping", "trainer")

_FEW_SETTINGS = 3  # in a label, if they tell models apart
_LONGEST_LABEL = 40  # characters behind the method's name
_MANY_SETTINGS = 10  # in a sentence


@dataclass(frozen=True)
class Models:
    """Models as frames. A model is a method at fixed settings; its seeds are replicas.

    Attributes:
        frame: A row for each model. The index is its label, such as `TRADES lam=9`; the columns are
            `method`, and for published models `source` and `statistic`.
        values: A row for each metric of a model: `label`, `weights`, `metric`, and over seeds
            `mean`, `sd` (NaN for one seed), `n`, and `images` (missing if seeds differ).
        runs: The runs of each model by label, sorted by seed; empty for published models.
        differs: By label, the settings that are not the same in all models of the method.
        epochs: Trajectories: `label`, `run`, `epoch`, `share` of training in (0, 1], and a column
            for each metric.
    """

    frame: pd.DataFrame
    values: pd.DataFrame
    runs: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def labels(self) -> list[str]:
        """The label of each model."""
        return list(self.frame.index)

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of their first models."""
        return list(dict.fromkeys(self.frame["method"]))

    def column(self, name: str, weights: Weights = "final") -> pd.DataFrame:
        """`mean`, `sd`, `n` and `images` of a metric by label, for the models that have it."""
        return self._columns.get((name, weights), self._none)

    @cached_property
    def _columns(self) -> dict[Any, pd.DataFrame]:
        values = self.values.set_index("label")[["metric", "weights", "mean", "sd", "n", "images"]]
        groups = values.groupby(["metric", "weights"], sort=False)
        return {key: rows.drop(columns=["metric", "weights"]) for key, rows in groups}

    @cached_property
    def _none(self) -> pd.DataFrame:
        return self.values.iloc[:0].set_index("label")[["mean", "sd", "n", "images"]]

    def mean(self, label: str, name: str, weights: Weights = "final") -> float | None:
        """The mean of a metric over seeds, or None if it was not measured."""
        column = self.column(name, weights)
        return float(column.at[label, "mean"]) if label in column.index else None

    def points(self, x: str, y: str, weights: Weights = "final") -> pd.DataFrame:
        """Models that have two metrics: `method`, the means `x` and `y`, and `dx` and `dy`.

        Deviations over seeds are 0 for models of one seed.
        """
        across, up = self.column(x, weights), self.column(y, weights)
        placed = self.frame[["method"]].assign(
            x=across["mean"], y=up["mean"], dx=across["sd"], dy=up["sd"]
        )
        return placed.dropna(subset=["x", "y"]).fillna({"dx": 0.0, "dy": 0.0})

    def series(self, label: str, *names: str) -> pd.DataFrame | None:
        """A metric during training over the seeds of a model.

        Args:
            label: The model.
            names: Metrics. The first one that a run has is taken.

        Returns:
            `share`, `mean`, `low`, `high` and the number of `seeds`, a row for each epoch that all
            seeds with the metric have; None if there is no such epoch.
        """
        own = self.epochs[self.epochs["label"] == label] if len(self.epochs) else self.epochs
        for name in names:
            if name not in own:
                continue
            # Without rows, the mean would be over other seeds in other epochs.
            seeds = own.pivot(index="share", columns="run", values=name).dropna(axis=1, how="all")
            if len(common := seeds.dropna()) and common.shape[1]:
                over = {"mean": common.mean(axis=1), "low": common.min(axis=1)}
                over |= {"high": common.max(axis=1), "seeds": common.shape[1]}
                return pd.DataFrame(over).reset_index()
        return None

    def settings(self, label: str) -> str:
        """The settings that differ, if a letter stands for them in the label; else empty."""
        if not re.search(r" \([a-z]+\)$", label):
            return ""
        texts = _texts(self.differs.get(label, {}))
        more = len(texts) - _MANY_SETTINGS
        return ", ".join([*texts[:_MANY_SETTINGS], *([f"{more} more"] if more > 0 else [])])

    def diverged(self, label: str) -> str:
        """The runs whose network became not finite, and their epochs; else empty."""
        return ", ".join(
            f"{run.name} (from epoch {run.diverged_epoch})"
            for run in self.runs.get(label, ())
            if run.diverged_epoch is not None
        )


def read_run(path: str | Path) -> pd.DataFrame:
    """Reads the trajectory of the finished run in a run folder.

    Returns:
        A row for each epoch: `epoch` and a column for each metric; errors are shares of 1. `attrs`
        has `method`, `data`, `seed` and `early_stopped_epoch`.

    Raises:
        ValueError: If the run has not finished or is broken.
    """
    run = load_run(path)
    trajectory = pd.DataFrame(list(run.trajectory))
    names = ("method", "data", "seed", "early_stopped_epoch")
    trajectory.attrs |= {name: getattr(run, name) for name in names}
    return trajectory


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Reads the metrics of all finished runs below a folder, at any depth, or in it.

    Returns:
        Two rows for each run, with `weights` `final` and `early_stopped`: `run` (the folder's
        name), `method`, `data`, `seed`, `weights`, `epochs`, and a column for each metric; errors
        are shares of 1. `attrs["left_out"]` lists folders that cannot be used, with reasons.

    Raises:
        ValueError: If `folder` is not a folder.

    Example:
        >>> runs = read_runs("runs")  # doctest: +SKIP
        >>> last = runs[runs["weights"] == "final"]  # doctest: +SKIP
        >>> last.groupby("method")["test/robust_error"].agg(["mean", "std"])  # doctest: +SKIP
    """
    runs, left_out = find_runs(folder)
    columns = ["run", "method", "data", "seed", "weights", "epochs"]
    rows = [
        dict(zip(columns, (run.name, run.method, run.data, run.seed, weights, run.epochs)))
        | dict(run.metrics(weights))
        for run in runs
        for weights in WEIGHTS
    ]
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    frame.attrs["left_out"] = [(str(path), reason) for path, reason in left_out]
    return frame


def drop_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Keeps one of the runs with the same method, data, seed and training settings.

    The same seed again is not a replica and would narrow the deviation over seeds. The run stays
    that was measured best: with AutoAttack, with more steps and restarts, with more metrics, on
    more images; of equal ones the last by the numbers in its name, which is the newest of `at-s0`,
    `at-s0-2`, `at-s0-10`.

    Runs without a seed all stay. Returns the runs that stay, in their order, and those left out.
    """
    seeded = [run for run in runs if run.seed is not None]
    best = {_training_key(run): run for run in sorted(seeded, key=_worth)}
    kept: list[Run] = []
    left_out: list[LeftOut] = []
    for run in runs:
        other = run if run.seed is None else best[_training_key(run)]
        if other is run:
            kept.append(run)
            continue
        is_better = _measured(other) > _measured(run)
        more = "which was measured better" if is_better else "which comes later"
        # Parent folders on this machine are private.
        name = "/".join(other.folder.parts[-2:])
        left_out.append(LeftOut(run.folder, f"is the same training as {name}, {more}"))
    return kept, left_out


def group_runs(runs: Iterable[Run]) -> Models:
    """Groups runs of one data set, without duplicates, by method and settings.

    Models are sorted by method and the values of the settings that differ.
    """
    by_method: dict[str, list[Run]] = {}
    protocols: dict[str, set[str]] = {}
    for run in runs:
        by_method.setdefault(method_of(run.method), []).append(run)
        for name, value in _protocol(run).items():
            protocols.setdefault(name, set()).add(exact_text(value))
    mixed = [name for name, values in protocols.items() if len(values) > 1]
    models: list[tuple[str, str, list[Run], dict[str, Any]]] = []
    for method in sorted(by_method):
        for label, own, differs in _group_method(method, by_method[method], mixed):
            # A run may be called `TRADES lam=9`.
            while any(label == other for _, other, *_ in models):
                label = f"{label} ({method})"
            models.append((method, label, own, differs))
    grouped = {
        label: tuple(sorted(own, key=lambda run: (run.seed is None, run.seed or 0, run.name)))
        for _, label, own, _ in models
    }
    index = pd.Index(list(grouped), name="label", dtype=object)
    return Models(
        pd.DataFrame({"method": [method for method, *_ in models]}, index=index),
        metric_values(
            (label, run.final, run.early_stopped, run.num_examples)
            for label, own in grouped.items()
            for run in own
        ),
        grouped,
        {label: differs for _, label, _, differs in models},
        _epochs(grouped),
    )


def metric_values(rows: Iterable[tuple[str, Metrics, Metrics, Mapping[str, int]]]) -> pd.DataFrame:
    """The `values` of `Models`, with the gaps of robust loss among the metrics.

    Each row is a replica: the label of its model, metrics of the last and of the early-stopped
    weights, and numbers of images. A value without a number of images is one of the last epoch, by
    another protocol than final values: it is not averaged with them, nor subtracted from them.
    """
    long = [
        (label, weights, name, value, images.get(name))
        for label, final, stopped, images in rows
        for weights, metrics in zip(WEIGHTS, (final, stopped))
        for name, value in (_gaps(metrics, final, stopped, images) | dict(metrics)).items()
    ]
    keys = ["label", "weights", "metric"]
    frame = pd.DataFrame(long, columns=[*keys, "value", "images"])
    frame["images"] = frame["images"].astype("Int64")
    is_final = frame["images"].notna()
    has_final = is_final.groupby([frame[key] for key in keys]).transform("any")
    frame = frame[is_final | ~has_final]
    groups = frame.groupby(keys, sort=False)
    over = {
        # Exact sums: the order of seeds changes no digit.
        "mean": groups["value"].agg(lambda seeds: statistics.fmean(seeds.tolist())),
        "sd": groups["value"].agg(
            lambda seeds: statistics.stdev(seeds.tolist()) if len(seeds) > 1 else float("nan")
        ),
        "n": groups.size(),
        "images": groups["images"].max().where(groups["images"].nunique(dropna=False) == 1),
    }
    return pd.DataFrame(over).reset_index()


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line, without those that change no metric.

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
        elif f"{prefix}{key}" == "trainer.callbacks":
            if trains := [callback for callback in value or [] if not _only_watches(callback)]:
                flat[f"{prefix}{key}"] = trains
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _only_watches(callback: Any) -> bool:
    """Whether a callback of the settings is known to change neither training nor measures."""
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path).rsplit(".", 1)[-1] in _WATCHERS


def is_training(name: str) -> bool:
    """Whether a setting changes what is trained, and not only what is measured.

    Example:
        >>> is_training("model.lam"), is_training("autoattack.num_examples")
        (True, False)
    """
    measures = name in _MEASURES or name.split(".", 1)[0] in _MEASURES
    return name in _TRAINING or not measures


def setting_text(name: str, value: Any) -> str:
    """`lam=9` for settings of training. Measures share names, so theirs keep their section."""
    short = name.split(".", 1)[0] in _SECTIONS and is_training(name)
    text = f"{value:g}" if is_number(value) else str(value)
    return f"{name.rsplit('.', 1)[-1] if short else name}={text}"


def exact_text(value: Any) -> str:
    """A value as text that is the same for 6 and 6.0."""
    return f"{value:.12g}" if is_number(value) else str(value)


def natural_key(text: str) -> list[tuple[int, str]]:
    """A sort key with `run-10` after `run-9`, and `run` before both."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _set_values(run: Run) -> dict[str, Any]:
    """Settings that have a value: an option that an older version lacks is not set."""
    flat = flat_settings(run.settings)
    # Of a run that was resumed with others, what it was trained with before.
    resumed = [
        f"{setting_text(name, value)} to epoch {part.get('before_epoch')}"
        for part in run.earlier_settings
        for name, value in flat_settings(part["settings"]).items()
        if name in flat and is_training(name) and exact_text(value) != exact_text(flat[name])
    ]
    if resumed:
        flat["resumed"] = ", ".join(resumed)
    if flat.get("data") in _AT_ANY_ROOT:
        flat.pop("data.root", None)
    return {
        name: value
        for name, value in (flat | {"data": run.data}).items()
        if value not in (None, _LATER.get(name.rsplit(".", 1)[-1]))
    }


def _training_key(run: Run) -> tuple[str, int | None, str]:
    trained = {name: exact_text(v) for name, v in _set_values(run).items() if is_training(name)}
    return method_of(run.method), run.seed, json.dumps(trained, sort_keys=True)


def _worth(run: Run) -> tuple[tuple[float, ...], list[tuple[int, str]], str]:
    return _measured(run), natural_key(run.name), str(run.folder)


def _measured(run: Run) -> tuple[float, ...]:
    """How well a run was measured: attacks, number of metrics and landscapes, images."""
    protocol = _protocol(run)
    sizes = [protocol.get(f"final.{name}") for name in ("steps", "restarts")]
    steps, restarts = (float(size) if is_number(size) else 0.0 for size in sizes)
    has_autoattack = "test/autoattack_error" in run.final
    metrics = len(run.final) + len(run.early_stopped) + len(run.landscapes)
    return has_autoattack, steps * restarts, metrics, sum(run.num_examples.values())


def _protocol(run: Run) -> dict[str, Any]:
    """What final errors and losses are measured with, as far as a run states it."""
    flat = flat_settings(run.settings)
    for name in ("eps", "norm"):
        flat[f"final.{name}"] = flat.get(f"final.{name}") or flat.get(f"data.{name}")
    return {name: flat[name] for name in _COMPARED if flat.get(name) is not None}


def _group_method(
    method: str, runs: Sequence[Run], mixed: Sequence[str] = ()
) -> list[tuple[str, list[Run], dict[str, Any]]]:
    """Models of one method: label, runs, and the settings that differ.

    Labels begin with the values of `mixed`, a protocol that is not the same in all methods.
    """
    values = [_set_values(run) for run in runs]
    names = sorted({name for settings in values for name in settings}, key=_importance)
    names = [n for n in names if len({exact_text(settings.get(n)) for settings in values}) > 1]
    groups: dict[tuple[str, ...], tuple[list[Run], dict[str, Any]]] = {}
    for run, settings in zip(runs, values):
        key = tuple(exact_text(settings.get(name)) for name in names)
        differs = {name: settings.get(name) for name in names}
        groups.setdefault(key, ([], differs))[0].append(run)
    ordered = sorted(groups.values(), key=lambda group: _by_value(group[1]))
    # For `final.eps` as for `data.eps`.
    short = {f"final.{name}": f"data.{name}" for name in ("eps", "norm")}
    starts, further = [], []
    for own, differs in ordered:
        protocol = _protocol(own[0])
        texts = [setting_text(short.get(n, n), protocol[n]) for n in mixed if n in protocol]
        starts.append(" ".join([method_label(method), *texts]))
        further.append({n: x for n, x in differs.items() if setting_text(n, x) not in texts})
    labels = _labels(starts, further)
    return [(label, own, differs) for label, (own, differs) in zip(labels, ordered)]


def _importance(name: str) -> tuple[bool, int, str]:
    """A sort key with the settings first that tell most about a model."""
    section = name.split(".", 1)[0]
    place = _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)
    return not is_training(name), place, name


def _by_value(differs: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    return [
        (0, float(value), "") if is_number(value) else (1, 0.0, str(value))
        for value in differs.values()
    ]


def _labels(methods: Sequence[str], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels that tell models apart, with letters if settings would make them long."""
    shown = _shown_settings(differences)
    if max(len(" ".join(texts)) for texts in shown) > _LONGEST_LABEL:
        return [f"{method} ({_letters(index)})" for index, method in enumerate(methods)]
    return [" ".join([method, *texts]) for method, texts in zip(methods, shown)]


def _shown_settings(differences: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Few settings of training, or all of them, and then as many of the measures as needed."""
    trained = [_texts(differs, training=True) for differs in differences]
    measured = [_texts(differs, training=False) for differs in differences]
    for number in range(_FEW_SETTINGS, max(_FEW_SETTINGS, *map(len, trained)) + 1):
        if _are_distinct(texts[:number] for texts in trained):
            return [_cut(texts, number) for texts in trained]
    for number in range(1, max(1, *map(len, measured)) + 1):
        shown = [[*own, *_cut(more, number)] for own, more in zip(trained, measured)]
        if _are_distinct(shown):
            break
    return shown


def _texts(differs: Mapping[str, Any], training: bool | None = None) -> list[str]:
    """Texts of settings, each once: `eps` of model and data is one number."""
    texts = (
        setting_text(name, value)
        for name, value in differs.items()
        if training is None or is_training(name) == training
    )
    return list(dict.fromkeys(texts))


def _cut(texts: Sequence[str], number: int) -> list[str]:
    return [*texts[:number], *["…"] * (len(texts) > number)]


def _are_distinct(items: Iterable[Sequence[str]]) -> bool:
    keys = [tuple(item) for item in items]
    return len(set(keys)) == len(keys)


def _letters(index: int) -> str:
    """From a to z, then aa, ab and so on."""
    before, last = divmod(index, len(ascii_lowercase))
    return (_letters(before - 1) if before else "") + ascii_lowercase[last]


def _gaps(
    metrics: Metrics, final: Metrics, stopped: Metrics, images: Mapping[str, int]
) -> dict[str, float]:
    """Differences of robust losses and errors, which are taken seed by seed."""
    gaps = {
        f"gap/{name}": metrics[f"test/{name}"] - metrics[f"train_eval/{name}"]
        for name in ("robust_loss", "robust_error")
        if {f"test/{name}", f"train_eval/{name}"} <= set(metrics)
        and (f"test/{name}" in images) == (f"train_eval/{name}" in images)
    }
    loss = "test/robust_loss"
    if metrics is final and loss in final and loss in stopped:
        gaps["last_minus_best/robust_loss"] = final[loss] - stopped[loss]
    return gaps


def _epochs(grouped: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for label, runs in grouped.items():
        total = max(run.epochs for run in runs)
        for place, run in enumerate(runs):
            # The last row of an epoch counts.
            last = {row["epoch"]: row for row in run.trajectory}.items()
            own = {"label": label, "run": place}
            rows += [{**own, "share": (epoch + 1) / total, **row} for epoch, row in last]
    columns = ["label", "run", "epoch", "share"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
