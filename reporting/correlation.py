"""The correlation of two metrics over models.

Example:
    >>> from robust_flatness.reporting.published import published_models
    >>> result = correlate(published_models(), "flatness/average/test", "test/robust_loss")
    >>> f"{result.pearson:.2f} {result.spearman:.2f} over {result.num_models} models"
    '0.85 0.86 over 74 models'
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from robust_flatness.reporting.frame import WEIGHTS, Models
from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import SPLITS, Weights

Interval = tuple[float, float]

# What a measure may go with, and the metric that a partial correlation holds fixed: how far
# training has fitted.
TARGETS = (
    *("test/robust_loss", "test/robust_error", "test/autoattack_error"),
    *("gap/robust_loss", "gap/robust_error"),
)
GIVEN = "train_eval/robust_error"
# First parts of names of losses and errors.
_NO_MEASURES = {*SPLITS, "gap", "last_minus_best", "attack", "single_step"}
_FEWEST = 3  # models for a coefficient, and methods for an interval
# Models for an interval: resamples of fewer are close to a line by chance.
_FEWEST_FOR_INTERVAL = 8
# Of 1 - r² for metrics that are linear in each other, with room.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Correlation:
    """Correlation of two metrics over models.

    Attributes:
        pearson: Pearson's coefficient.
        spearman: Spearman's coefficient.
        kendall: Kendall's τ-b.
        pearson_interval: 95 % bootstrap interval over methods; None for fewer than eight models or
            three methods.
        spearman_interval: The same of Spearman's coefficient.
        kendall_interval: The same of Kendall's.
        num_models: Number of models that have all metrics.
        num_methods: Number of their methods.
    """

    pearson: float
    spearman: float
    kendall: float
    pearson_interval: Interval | None
    spearman_interval: Interval | None
    kendall_interval: Interval | None
    num_models: int
    num_methods: int

    @property
    def over(self) -> str:
        """The number of models, and whether they are too few for an interval."""
        text = f"{self.num_models} models"
        return text if self.pearson_interval else f"{text}: too few for an interval"

    @property
    def text(self) -> str:
        """Two coefficients with their intervals, such as `Pearson 0.85 [0.78, 0.92], …`."""
        parts = {"Pearson": (self.pearson, self.pearson_interval)}
        parts["Spearman"] = (self.spearman, self.spearman_interval)
        return ", ".join(
            f"{name} {value:.2f}" + (" [{:.2f}, {:.2f}]".format(*interval) if interval else "")
            for name, (value, interval) in parts.items()
        )


def correlate(
    models: Models,
    x: str,
    y: str,
    *,
    weights: Weights = "final",
    given: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation | None:
    """Correlates two metrics over the models that have both.

    The interval is a percentile bootstrap over methods, each with all its models: models of one
    method resemble each other, so ten values of a setting are not ten independent models. Over few
    methods it is rough.

    Args:
        models: Each counts once, whatever its number of seeds.
        x: A metric, such as `flatness/average/test` or `gap/robust_loss`.
        y: The other one.
        weights: Whose metrics.
        given: A third metric, for partial correlations, which hold it fixed.
        resamples: Of the bootstrap, at least 1. Resamples without a coefficient, such as those in
            which a metric is constant, are left out.
        seed: Of the bootstrap.

    Returns:
        The correlation; None for fewer than three models (four with `given`), if a metric is the
        same for all, or if `given` determines `x` or `y`, or their ranks.

    Raises:
        ValueError: If `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"Expected `resamples` to be >= 1 but got {resamples}.")
    points = models.points(x, y, weights)
    columns = [points["x"], points["y"]]
    if given is not None:
        third = models.column(given, weights)["mean"].reindex(points.index).dropna()
        points = points.loc[third.index]
        columns = [points["x"], points["y"], third]
    number, names = len(points), sorted(set(points["method"]))
    if number < _FEWEST + (given is not None):
        return None
    values = [column.to_numpy(dtype=float) for column in columns]
    # Which model is of which method, `(models, methods)`.
    groups = np.array([[float(method == name) for name in names] for method in points["method"]])
    coefficients = _coefficients(values, groups, np.ones((1, len(names))))
    if not np.isfinite(coefficients).all():
        return None
    intervals: list[Interval | None] = [None] * 3
    if number >= _FEWEST_FOR_INTERVAL and len(names) >= _FEWEST:
        drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
        times = (drawn[:, :, None] == np.arange(len(names))).sum(axis=1).astype(float)
        resampled = _coefficients(values, groups, times)
        finite = [one[np.isfinite(one)] for one in resampled]
        intervals = [tuple(np.percentile(one, (2.5, 97.5))) if len(one) else None for one in finite]
    pearson, spearman, kendall = map(float, coefficients[:, 0])
    return Correlation(
        pearson, spearman, kendall, intervals[0], intervals[1], intervals[2], number, len(names)
    )


def correlation_table(sources: Mapping[str, Models]) -> pd.DataFrame:
    """The correlation of each measure with each measured loss, error and gap.

    Metrics of the last and of the early-stopped weights are never pooled.

    Args:
        sources: Models by what the table calls them.

    Returns:
        `x`, the measure; `y`; `of`, the source; `weights`; `given`, empty or the metric that is
        held fixed; `pearson`, `spearman` and `kendall`, each with `_low` and `_high`; and the
        numbers of `models` and `methods`.
    """
    names = dict.fromkeys(name for models in sources.values() for name in models.values["metric"])
    measures = [n for n in names if n.split("/")[0] not in _NO_MEASURES and n[-4:] != "_sem"]
    rows = []
    for x in measures:
        for y in TARGETS:
            for of, models in sources.items():
                for weights in WEIGHTS:
                    for given in (None, GIVEN):
                        result = correlate(models, x, y, weights=weights, given=given)
                        if result is not None:
                            key = {"x": x, "y": y, "of": of, "weights": weights}
                            rows.append({**key, "given": given or "", **_row(result)})
    columns = None if rows else ["x", "y", "of", "weights", "given"]
    return pd.DataFrame(rows, columns=columns)


def _row(result: Correlation) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in ("pearson", "spearman", "kendall"):
        low, high = getattr(result, f"{name}_interval") or (math.nan, math.nan)
        row |= {name: getattr(result, name), f"{name}_low": low, f"{name}_high": high}
    return row | {"models": result.num_models, "methods": result.num_methods}


def _coefficients(values: list[Array], groups: Array, times: Array) -> Array:
    """Pearson's, Spearman's and Kendall's coefficient of resamples, `(3, resamples)`.

    All three are sums over pairs of models (Daniels 1944): of differences, of differences of ranks
    and of signs. In a resample, all models of method m occur `times[:, m]` times. Equal values
    differ by exactly 0, so that a constant metric has no coefficient (NaN). With a third metric
    they are partial coefficients.
    """
    differences = [value[:, None] - value for value in values]
    signs = [np.sign(difference) for difference in differences]
    # Ranks within each resample, from their mean; repeated models are ties.
    ranks = [times @ (sign @ groups).T for sign in signs]

    def pairs(a: Array, b: Array) -> Array:
        return np.asarray(((times @ (groups.T @ (a * b) @ groups)) * times).sum(axis=1))

    def ranked(a: Array, b: Array) -> Array:
        return np.asarray((times @ groups.T * a * b).sum(axis=1))

    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for parts, product in ((differences, pairs), (ranks, ranked), (signs, pairs)):
            norms = [np.sqrt(product(part, part)) for part in parts]
            xy, xz, yz = (
                np.clip(product(parts[i], parts[j]) / (norms[i] * norms[j]), -1, 1)
                if len(parts) > j
                else np.zeros(len(times))
                for i, j in ((0, 1), (0, 2), (1, 2))
            )
            # Without a third metric, its correlations of 0 change nothing. What it determines up to
            # rounding has no partial coefficient.
            xx, yy = (np.where(1 - r**2 > _ROUNDING, 1 - r**2, np.nan) for r in (xz, yz))
            found.append((xy - xz * yz) / np.sqrt(xx * yy))
    return np.array(found)
