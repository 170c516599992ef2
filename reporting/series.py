"""Figures throughout training, over the seeds of a model, and which models a figure shows.

Example:
    >>> Series((0.5, 1.0), (200.0, 150.0), (190.0, 140.0), (210.0, 160.0), 3).divided(100).mean
    (2.0, 1.5)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from robust_flatness.plotting.method_labels import METHOD_LABELS
from robust_flatness.reporting.models import Model
from robust_flatness.reporting.runs import Run
from robust_flatness.reporting.settings import flat_settings

ADAM, BATCH_SIZE = "Adam", "another batch size"


@dataclass(frozen=True)
class Series:
    """A figure throughout training, over seeds.

    Attributes:
        shares: Shares of training that have passed, in (0, 1], rising.
        mean: Over seeds, one for each share.
        low: The lowest seed.
        high: The highest seed.
        num_seeds: Seeds that have the figure.
    """

    shares: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_seeds: int

    def divided(self, by: float) -> "Series":
        """The same in units of `by`."""
        mean, low, high = (
            tuple(value / by for value in values) for values in (self.mean, self.low, self.high)
        )
        return replace(self, mean=mean, low=low, high=high)


def model_series(model: Model, *names: str) -> Series | None:
    """A figure throughout training, the mean over seeds.

    Args:
        model: Its runs' trajectories are read.
        names: Names of the figure, of which the first that any run has is taken.

    Returns:
        The epochs that all seeds with the figure have, so that the mean is always over the same
        seeds; None where there are none.
    """
    total = max((run.epochs for run in model.runs), default=0)
    for name in names:
        columns = [found for found in (_column(run, name) for run in model.runs) if found]
        if not columns:
            continue
        epochs = sorted(set.intersection(*map(set, columns)))
        if not epochs:
            continue
        values = [[column[epoch] for column in columns] for epoch in epochs]
        return Series(
            shares=tuple((epoch + 1) / total for epoch in epochs),
            mean=tuple(map(fmean, values)),
            low=tuple(map(min, values)),
            high=tuple(map(max, values)),
            num_seeds=len(columns),
        )
    return None


def draw_series(axes: Axes, series: Series, *, colour: str, **look: Any) -> None:
    """Draws the mean as a line and, where there are several seeds, their range as a faint band.

    Args:
        axes: The panel.
        series: What is drawn.
        colour: Of line and band.
        look: Of the line, as matplotlib names it.
    """
    if len(series.shares) <= 10:
        # A single epoch is no line, and a few are easier to read with their points.
        look = {"marker": "o", "markersize": 2.0} | look
    axes.plot(series.shares, series.mean, color=colour, **look)
    if series.num_seeds > 1:
        band = (series.low, series.high)
        axes.fill_between(series.shares, *band, color=colour, alpha=0.18, linewidth=0, zorder=1)


def select_models(models: Sequence[Model], preferred: Sequence[str], most: int) -> list[Model]:
    """The models that a figure has room for, in the order in which it shows them.

    Each method comes once before any comes twice, so that a sweep does not crowd others out. What
    the paper shows for another reason than its method counts as a method of its own: Adam as
    `ADAM`, and another batch size than that of most models as `BATCH_SIZE`.

    Args:
        models: All that could be shown.
        preferred: Methods that come first, in this order.
        most: The figure's room.

    Example:
        >>> from pathlib import Path
        >>> run = Run(Path(), "", "", 0, {}, {}, {}, {}, [], None, 1, 1.0)
        >>> model = lambda method, lam: Model(method, f"{method} {lam}", (run,), {})
        >>> models = [model("mart", 6), model("trades", 6), model("trades", 9), model("at", 0)]
        >>> [chosen.label for chosen in select_models(models, ["at", "trades"], 3)]
        ['at 0', 'trades 6', 'mart 6']
    """
    places = {name: place for place, name in enumerate(preferred)}
    seen: Counter[str] = Counter()
    keyed: list[tuple[int, int, Model]] = []
    for name, model in zip(_families(models), models):
        keyed.append((seen[name], places.get(name, len(places)), model))
        seen[name] += 1
    return [model for *_, model in sorted(keyed, key=lambda key: key[:2])][:most]


def _families(models: Sequence[Model]) -> list[str]:
    settings = [flat_settings(model.runs[0].settings) for model in models]
    sizes = [flat.get("data.batch_size") for flat in settings]
    usual = Counter(sizes).most_common(1)[0][0] if sizes else None
    families = []
    for model, flat, size in zip(models, settings, sizes):
        # A row of Table 1 stays what it is, whatever its preset brings along.
        varied = bool(model.differs) or model.method not in METHOD_LABELS
        if varied and str(flat.get("model.optimizer")).startswith("Adam"):
            families.append(ADAM)
        else:
            families.append(BATCH_SIZE if varied and size != usual else model.method)
    return families


def _column(run: Run, name: str) -> dict[float, float]:
    return {row["epoch"]: row[name] for row in run.trajectory if name in row}
