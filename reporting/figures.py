"""What the figures of models show, once for Matplotlib and for Plotly.

`Figures` chooses metrics, models, colors and words. `matplotlib_figures` and `plotly_figures` draw.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from robust_flatness.plotting.canvas import GREY, method_styles
from robust_flatness.reporting.correlation import Correlation, correlate, correlation_table
from robust_flatness.reporting.frame import WEIGHTS, Models, flat_settings, group_runs
from robust_flatness.reporting.sweeps import find_sweeps
from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import METHOD_LABELS, Weights, method_label, metric
from robust_flatness.run_folder.runs import Run

PUBLISHED = "published (CIFAR-10)"
FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"
TRAIN_FLATNESS = "flatness/average/train"
ERRORS = ("test/autoattack_error", "test/robust_error")
GAPS = ("gap/robust_loss", "last_minus_best/robust_loss")
ADAM, BATCH_SIZE = "Adam", "another batch size"

# Models of one method share a color; the later ones have other strokes.
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Points or lines of one look.

    Attributes:
        points: `x` and `y`, and what else applies: deviations `dx` and `dy`, a band from `low` to
            `high`, the `share` of training. The index has labels of models.
        kind: `arrows` go from each even point to the odd one behind it; a `vertical` line stands at
            the first point.
        label: Its name in legends.
        color: As `#rrggbb`.
        marker: Matplotlib's name of a marker.
        dash: Plotly's name of a stroke.
        method: Whose it is; None for a line of reference.
        model: Label of the only model that it is of.
        is_published: Whether it is the paper's.
        weights: Whose metrics they are.
    """

    points: pd.DataFrame
    kind: Literal["points", "line", "arrows", "vertical", "diagonal"] = "points"
    label: str = ""
    color: str = GREY
    marker: str = "o"
    dash: str = "dot"
    width: float = 1.2
    method: str | None = None
    model: str | None = None
    is_published: bool = False
    weights: Weights = "final"


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Models in the plane of two metrics: traces, correlations by source, and a note on lines."""

    x: str
    y: str
    traces: Sequence[Trace]
    correlations: Mapping[str, Correlation]
    note: str = ""


class Rise(NamedTuple):
    """What flatness measures in a landscape along random directions.

    `steps` are `(S,)` and losses `curves` `(D, S)`. The `typical` direction has the median rise;
    `before`, `here` and `beyond` are its losses at w − ν, w and w + ν. `mean` is the mean rise from
    w to w + ν, the average-case flatness.
    """

    steps: Array
    curves: Array
    typical: int
    before: float
    here: float
    beyond: float
    mean: float


class Figures:
    """The figures of a report.

    Args:
        models: Our models, of one data set.
        published: The paper's models.
        trajectories: The paper's trajectories, as `published_trajectories` returns them.
    """

    def __init__(
        self,
        models: Models,
        published: Models | None = None,
        trajectories: pd.DataFrame | None = None,
    ) -> None:
        self.models, self.published = models, published or group_runs([])
        self.trajectories = pd.DataFrame() if trajectories is None else trajectories
        self.sources = ((self.published, True), (models, False))
        theirs = [*self.published.methods, *self.trajectories.get("method", ())]
        self.styles = method_styles(models.methods, theirs)
        # The place of each model among those of its method.
        self.rank = models.frame.groupby("method").cumcount().to_dict()
        classes = {run.num_classes for runs in models.runs.values() for run in runs}
        # The losses of guessing, ln K, by label.
        self.guessing = {f"guessing (ln {k})": math.log(k) for k in sorted(filter(None, classes))}
        # For figures of one model: the baseline, or else any, whose first seed has a landscape.
        methods = models.frame["method"].to_dict()
        self.baseline_first = sorted(models.labels, key=lambda label: methods[label] != "at")
        seeds = (models.runs[label][0] for label in self.baseline_first if models.runs)
        self.example = next(filter(typical_rise, seeds), None)

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """The correlations of each measure, of our models as `runs` and of the paper's."""
        sources = {"runs": self.models, "paper, CIFAR-10": self.published}
        return correlation_table({of: models for of, models in sources.items() if len(models)})

    @property
    def mapped_correlations(self) -> pd.DataFrame:
        """Those that a map shows: of measures that are not on training images."""
        table = self.correlations
        return table.loc[[metric(name).split != "train" for name in table["x"]]]

    @cached_property
    def details(self) -> dict[str, pd.DataFrame]:
        """What some runs measure beyond metrics, a row each: checks, RErr against ε and by class.

        All have `model`, `run` and `weights`. `checks` add `name`, `passed` and `text`;
        `error_curve` adds `eps` and `robust_error`, `class_errors` `split`, `class` and the same.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for label, runs in self.models.runs.items():
            for run in runs:
                for weights in WEIGHTS:
                    key = {"model": label, "run": run.name, "weights": weights}
                    curve = run.error_curve.get(weights, {})
                    pairs = zip(curve.get("eps", ()), curve.get("robust_error", ()))
                    found = {
                        "checks": run.checks.get(weights, ()),
                        "error_curve": [{"eps": e, "robust_error": error} for e, error in pairs],
                        "class_errors": [
                            {"split": split, "class": number, "robust_error": error}
                            for split, errors in run.class_errors.get(weights, {}).items()
                            for number, error in enumerate(errors)
                        ],
                    }
                    for name, own in found.items():
                        rows.setdefault(name, []).extend({**key, **row} for row in own)
        return {name: pd.DataFrame(own) for name, own in rows.items() if own}

    def details_lines(self, name: str, x: str) -> list[Trace]:
        """RErr of the last weights on test images by `x`, a line of means over seeds a model."""
        rows = self.details.get(name, pd.DataFrame({"model": [], "weights": []}))
        rows = rows[rows["weights"] == "final"]
        if "split" in rows:
            rows = rows[rows["split"] == "test"]
        lines = []
        for label, own in rows.groupby("model", sort=False):
            means = own.groupby(x)["robust_error"].mean().dropna()
            points = pd.DataFrame({"x": means.index, "y": means.to_numpy()})
            if len(points):
                lines.append(self.line(str(label), points, width=1.6))
        return lines

    def relation(self, x: str, y: str, weights: Weights = "final") -> Relation | None:
        """Models as points; None if none of ours, or without ours none at all, has both metrics."""
        points = {theirs: models.points(x, y, weights) for models, theirs in self.sources}
        if points[not len(self.models)].empty:
            return None
        traces = [
            self._trace(str(method), own, is_published=is_published, weights=weights)
            for is_published, placed in points.items()
            for method, own in placed.groupby("method", sort=False)
        ]
        related = {
            PUBLISHED if is_published else "": result
            for models, is_published in reversed(self.sources)
            if (result := correlate(models, x, y, weights=weights)) is not None
        }
        return Relation(x=x, y=y, traces=traces, correlations=related)

    def early_stopping(self, y: str = LOSS) -> Relation | None:
        """Points of the last weights, with an arrow from each to the early-stopped ones."""
        arrows: list[Trace] = []
        for models, is_published in self.sources:
            last, best = (models.points(FLATNESS, y, w) for w in ("final", "early_stopped"))
            for method, starts in last[last.index.isin(best.index)].groupby("method", sort=False):
                both = [starts, best.loc[starts.index]]
                # In turns: the place of a model's last weights, and of its early-stopped ones.
                turns = pd.concat(both).iloc[np.arange(2 * len(starts)).reshape(2, -1).T.ravel()]
                look = {"kind": "arrows", "is_published": is_published, "weights": "early_stopped"}
                arrows.append(self._trace(str(method), turns, **look))
        # The paper's are drawn beside ours, not alone.
        if not arrows or (len(self.models) and arrows[-1].is_published):
            return None
        note = "An arrow points from the last to the early-stopped weights of a model."
        return _add(self.relation(FLATNESS, y), note, arrows)

    def kink(self, y: str) -> Relation | None:
        """RErr against RLoss, with a least-squares line on either side of ln K.

        Beyond ln K, the RLoss of guessing, models are wrong with confidence: the loss rises on
        while the error hardly does (Fig. 7; the paper splits at 2.3 = ln 10).
        """
        lines = [
            Trace(points=pd.DataFrame({"x": [x]}), kind="vertical", label=label, dash="dash")
            for label, x in self.guessing.items()
        ]
        if not lines:
            return self.relation(LOSS, y)
        points, edge = self.models.points(LOSS, y), min(self.guessing.values())
        for side in (points[points["x"] <= edge], points[points["x"] > edge]):
            lines += _trend(Trace(points=side, label="least squares on either side"), at_least=3)
        note = (
            "Dotted: least-squares lines of all your models on both sides of the loss of guessing, "
            "if three are there."
        )
        return _add(self.relation(LOSS, y), note, lines)

    def hyperparameters(self) -> Relation | None:
        """RLoss against flatness, with a least-squares line through each sweep, if there is one."""
        sweeps = list(self.sweeps())
        if not sweeps or (len(self.models) and sweeps[-1].is_published):
            return None
        note = (
            "Dotted: the least-squares line of each sweep, whose models differ in one number of "
            "their training alone."
        )
        trends = [trend for sweep in sweeps for trend in _trend(sweep, at_least=2)]
        return _add(self.relation(FLATNESS, LOSS), note, trends)

    def sweeps(self) -> Iterator[Trace]:
        """The models of each sweep in the order of its setting, with that setting as `name`."""
        for models, is_published in self.sources:
            placed = models.points(FLATNESS, LOSS)
            for sweep in find_sweeps(models, placed.index):
                points = placed.loc[list(sweep)].assign(name=list(sweep.values()))
                yield self._trace(points["method"].iloc[0], points, is_published=is_published)

    def train_flatness(self) -> Relation | None:
        """Flatness on training images against flatness on test images, with the diagonal."""
        relation = self.relation(FLATNESS, TRAIN_FLATNESS)
        if relation is None:
            return None
        points = pd.concat([trace.points for trace in relation.traces])
        line = Trace(points=points, kind="diagonal", label="equally flat on both", dash="dash")
        return _add(relation, "Dashed: equal on both.", [line])

    def paths(self) -> list[Trace]:
        """Trajectories through the plane of flatness and RLoss, of models that have both.

        Points of ours are means over seeds, at the epochs that all seeds measured.
        """
        traces: list[Trace] = []
        names = {"progress": "share", FLATNESS: "x", LOSS: "y"}
        if set(names) <= set(self.trajectories):
            rows = self.trajectories.rename(columns=names).dropna(subset=list(names.values()))
            for method, own in rows.sort_values("share").groupby("method"):
                look = {"kind": "line", "model": method_label(str(method)), "is_published": True}
                traces.append(self._trace(str(method), own, **look))
        for label in self.models.labels:
            measured = [self.models.series(label, name) for name in (FLATNESS, LOSS)]
            both = [series for series in measured if series is not None]
            if len(both) == 2:
                across, up = (one.set_index("share")["mean"] for one in both)
                path = pd.DataFrame({"x": across, "y": up}).dropna().rename_axis("share")
                traces += [self.line(label, path.reset_index())] if len(path) else []
        return traces

    def landscape(self, name: str) -> list[Trace]:
        """RLoss along directions: a line for each model that has the landscape.

        It is the mean over the directions of all seeds, and of `adversarial` ones the highest. Its
        band reaches from the lowest direction to the highest. Steps with a loss that is not finite
        are left out.
        """
        traces: list[Trace] = []
        for label, runs in self.models.runs.items():
            seeds = [run.landscapes[name] for run in runs if name in run.landscapes]
            steps = [tuple(seed.coordinates) for seed in seeds]
            same = [seed.curves for seed, own in zip(seeds, steps) if own == steps[0]]
            points = pd.DataFrame(np.concatenate(same).T if same else [], steps[:1] and steps[0])
            points = points[np.isfinite(points).all(axis=1)]
            if len(points):
                low, high = points.min(axis=1), points.max(axis=1)
                drawn = high if name.endswith("adversarial") else points.mean(axis=1)
                columns = {"x": points.index, "y": drawn, "low": low, "high": high}
                traces.append(self.line(label, pd.DataFrame(columns)))
        return traces

    def line(self, label: str, points: pd.DataFrame, **look: Any) -> Trace:
        """A line of one of our models."""
        dash = _DASHES[self.rank[label] % len(_DASHES)]
        look = {"kind": "line", "label": label, "model": label, "dash": dash, **look}
        return self._trace(self.models.frame.at[label, "method"], points, **look)

    def _trace(self, method: str, points: pd.DataFrame, **look: Any) -> Trace:
        color, marker = self.styles[method]
        look = {"label": method_label(method), "color": color, "marker": marker, **look}
        return Trace(points=points, method=method, **look)


def typical_rise(run: Run | None) -> Rise | None:
    """The rise in a run's landscape of its last weights; None without one from -ν to ν."""
    landscape = None if run is None else run.landscapes.get("final/random")
    if landscape is None or not np.isfinite(landscape.losses).all():
        return None
    steps, curves = landscape.coordinates, landscape.curves
    if len(steps) < 2 or steps[0] > -1 + 1e-9 or steps[-1] < 1 - 1e-9:
        return None
    losses = np.array([np.interp((-1.0, 0.0, 1.0), steps, curve) for curve in curves])
    typical = int(np.argsort(losses[:, 2])[len(losses) // 2])
    rise = float((losses[:, 2] - losses[:, 1]).mean())
    before, here, beyond = map(float, losses[typical])
    return Rise(steps, curves, typical, before, here, beyond, rise)


def select_models(
    models: Models, able: Sequence[str], preferred: Sequence[str], most: int
) -> list[str]:
    """The models that a figure has room for, in the order in which it shows them.

    Each method comes once before any comes twice, so that a sweep does not crowd others out. What
    the paper shows for another reason than its method counts as a method of its own: Adam as
    `ADAM`, and another batch size than that of most models as `BATCH_SIZE`.
    """
    settings = {label: flat_settings(models.runs[label][0].settings) for label in able}
    sizes = {label: flat.get("data.batch_size") for label, flat in settings.items()}
    usual = Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    places = {name: place for place, name in enumerate(preferred)}
    seen: Counter[str] = Counter()
    keys: dict[str, tuple[int, int]] = {}
    for label in able:
        family = models.frame.at[label, "method"]
        # A row of Table 1 keeps its name, whatever else its preset sets.
        if models.differs[label] or family not in METHOD_LABELS:
            if str(settings[label].get("model.optimizer")).startswith("Adam"):
                family = ADAM
            elif sizes[label] != usual:
                family = BATCH_SIZE
        keys[label] = (seen[family], places.get(family, len(places)))
        seen[family] += 1
    return sorted(able, key=keys.__getitem__)[:most]


def _trend(of: Trace, at_least: int) -> list[Trace]:
    """The least-squares line between the ends of points, if there are enough of them."""
    x, y = of.points["x"], of.points["y"]
    if len(x) < at_least or x.min() == x.max():
        return []
    ends = np.array([x.min(), x.max()])
    points = pd.DataFrame({"x": ends, "y": np.polyval(np.polyfit(x, y, 1), ends)})
    return [replace(of, points=points, kind="line")]


def _add(relation: Relation | None, note: str, lines: Sequence[Trace]) -> Relation | None:
    return relation and replace(relation, traces=[*relation.traces, *lines], note=note)
