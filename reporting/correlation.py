"""The correlation of two metrics over models.

Example:
    >>> from robust_flatness.reporting.published import published_models
    >>> result = correlate(published_models(), "flatness/average/test", "test/robust_loss")
    >>> f"{result.pearson:.2f} {result.spearman:.2f} over {result.num_models} models"
    '0.85 0.86 over 74 models'
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_flatness.reporting.frame import Models
from robust_flatness.run_folder.files import Array
from robust_flatness.run_folder.metrics import Weights

Interval = tuple[float, float]

_FEWEST = 3  # models for a coefficient, and methods for an interval
# Models for an interval: resamples of fewer are close to a line by chance.
_FEWEST_FOR_INTERVAL = 8
_LEVEL = 0.95


@dataclass(frozen=True)
class Correlation:
    """Correlation of two metrics over models.

    Attributes:
        pearson: Pearson's coefficient.
        spearman: Spearman's coefficient.
        pearson_interval: 95 % bootstrap interval over methods; None for fewer than eight models or
            three methods.
        spearman_interval: The same of Spearman's coefficient.
        num_models: Number of models that have both metrics.
        num_methods: Number of their methods.
    """

    pearson: float
    spearman: float
    pearson_interval: Interval | None
    spearman_interval: Interval | None
    num_models: int
    num_methods: int

    @property
    def over(self) -> str:
        """The number of models, and whether they are too few for an interval."""
        text = f"{self.num_models} models"
        return text if self.pearson_interval else f"{text}: too few for an interval"

    @property
    def text(self) -> str:
        """Both coefficients with their intervals, such as `Pearson 0.85 [0.78, 0.92], …`."""
        pearson = _with_interval(self.pearson, self.pearson_interval)
        return (
            f"Pearson {pearson}, Spearman {_with_interval(self.spearman, self.spearman_interval)}"
        )


def correlate(
    models: Models,
    x: str,
    y: str,
    *,
    weights: Weights = "final",
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
        resamples: Of the bootstrap, at least 1. Resamples in which a metric is constant have no
            coefficient and are left out.
        seed: Of the bootstrap.

    Returns:
        The correlation; None for fewer than three models, or if a metric is the same for all.

    Raises:
        ValueError: If `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"Expected `resamples` to be >= 1 but got {resamples}.")
    points = models.points(x, y, weights)
    xs, ys = (points[axis].to_numpy(dtype=float) for axis in "xy")
    if len(xs) < _FEWEST or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    from scipy.stats import pearsonr, spearmanr  # not at the top: it takes a second to import

    names = sorted(set(points["method"]))
    pearson_interval = spearman_interval = None
    if len(xs) >= _FEWEST_FOR_INTERVAL and len(names) >= _FEWEST:
        drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
        times = (drawn[:, :, None] == np.arange(len(names))).sum(axis=1).astype(float)
        counts = times[:, points["method"].map(names.index)]
        varies = _varies(xs, counts) & _varies(ys, counts)
        pearson_interval = _interval(_pearson(xs, ys, counts)[varies])
        ranks = _ranks(xs, counts), _ranks(ys, counts)
        spearman_interval = _interval(_pearson(*ranks, counts)[varies])
    return Correlation(
        float(pearsonr(xs, ys).statistic),
        float(spearmanr(xs, ys).statistic),
        pearson_interval,
        spearman_interval,
        num_models=len(xs),
        num_methods=len(names),
    )


def _interval(coefficients: Array) -> Interval | None:
    if not len(coefficients):
        return None
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(coefficients, (tail, 100 - tail))
    return float(low), float(high)


def _varies(values: Array, counts: Array) -> Any:
    """Whether a resample has more than one value; `(resamples,)`."""
    drawn = np.where(counts > 0, values, np.nan)
    return np.nanmax(drawn, axis=1) > np.nanmin(drawn, axis=1)


def _pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's coefficient of resamples in which model i occurs `counts[:, i]` times."""
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    xy, xx, yy = ((counts * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
    with np.errstate(invalid="ignore", divide="ignore"):  # of constant metrics
        return np.asarray(np.clip(xy / np.sqrt(xx * yy), -1, 1))


def _ranks(values: Array, counts: Array) -> Array:
    """Mean ranks within each resample, `(resamples, n)`; repeated models are ties."""
    distinct, index = np.unique(values, return_inverse=True)
    tied = counts @ (index[:, None] == np.arange(len(distinct)))
    return np.asarray((np.cumsum(tied, axis=1) - tied / 2)[:, index])


def _with_interval(value: float, interval: Interval | None) -> str:
    return f"{value:.2f}" + (" [{:.2f}, {:.2f}]".format(*interval) if interval else "")
