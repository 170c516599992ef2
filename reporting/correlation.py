"""How closely two figures go together over models.

Example:
    >>> from robust_flatness.reporting.published import published_models
    >>> found = correlate(published_models(), "flatness/average/test", "test/robust_loss")
    >>> f"{found.pearson:.2f} {found.spearman:.2f} over {found.num_models} models"
    '0.85 0.86 over 74 models'
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robust_flatness.reporting.models import Point
from robust_flatness.reporting.runs import Weights

Array = NDArray[np.float64]
Interval = tuple[float, float]
# The name of a figure, or what is computed from several, such as a generalisation gap.
_Quantity = str | Callable[[Point], float | None]

_FEWEST = 3  # models, and methods that an interval resamples
# Models that an interval needs: resamples of fewer are close to a line by chance.
_FEWEST_FOR_INTERVAL = 8
_LEVEL = 0.95


@dataclass(frozen=True)
class Correlation:
    """Correlation of two figures over models.

    Attributes:
        pearson: Pearson's coefficient, in [-1, 1].
        spearman: Spearman's coefficient, in [-1, 1].
        pearson_interval: 95 % bootstrap interval over methods; None for fewer than eight models or
            three methods.
        spearman_interval: The same of Spearman's coefficient.
        num_models: Models that have both figures.
        num_methods: Methods that these are of.
    """

    pearson: float
    spearman: float
    pearson_interval: Interval | None
    spearman_interval: Interval | None
    num_models: int
    num_methods: int

    @property
    def over(self) -> str:
        """What it is over, and that there is no interval where these are too few."""
        text = f"{self.num_models} models"
        return text if self.pearson_interval else f"{text}: too few for an interval"


def correlate(
    points: Iterable[Point],
    x: _Quantity,
    y: _Quantity,
    *,
    weights: Weights = "final",
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation | None:
    """Correlates two figures over the models that have both.

    The interval is a percentile bootstrap that draws methods and takes each with all its models:
    models of one method resemble each other, so that a sweep of ten values is no ten independent
    models. Over a handful of methods it is rough.

    Args:
        points: Models. Each counts once, however many seeds it has.
        x: Name of a figure, such as `flatness/average/test`, or a function that computes one from a
            model and gives None where it cannot.
        y: The same.
        weights: Whether figures by name are those of the last or of the early-stopped weights.
        resamples: Of the bootstrap, at least 1. Those in which a figure is constant have no
            coefficient and are left out.
        seed: Of the bootstrap.

    Returns:
        The correlation; None for fewer than three models, or where a figure is the same for all.

    Raises:
        ValueError: If `resamples` is below 1.

    Example:
        >>> from robust_flatness.reporting.published import published_models
        >>> def gap(model):
        ...     return model.mean("test/robust_loss") - model.mean("train_eval/robust_loss")
        >>> round(correlate(published_models(), "flatness/average/test", gap).pearson, 2)
        0.84
    """
    if resamples < 1:
        raise ValueError(f"Expected `resamples` to be >= 1 but got {resamples}.")
    methods, xs, ys = _columns(points, x, y, weights)
    if len(xs) < _FEWEST or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    # Here and not above, since it takes a second that few callers of this package need to wait for.
    from scipy.stats import pearsonr, spearmanr

    intervals = _intervals(methods, xs, ys, resamples, seed)
    return Correlation(
        float(pearsonr(xs, ys).statistic),
        float(spearmanr(xs, ys).statistic),
        *intervals,
        num_models=len(xs),
        num_methods=len(set(methods)),
    )


def _columns(
    points: Iterable[Point], x: _Quantity, y: _Quantity, weights: Weights
) -> tuple[list[str], Array, Array]:
    """Methods `(n,)` and both figures, of the models that have both."""
    rows = [(p.method, _value(p, x, weights), _value(p, y, weights)) for p in points]
    both = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
    return [row[0] for row in both], np.array([r[1] for r in both]), np.array([r[2] for r in both])


def _value(point: Point, quantity: _Quantity, weights: Weights) -> float:
    value = point.mean(quantity, weights) if isinstance(quantity, str) else quantity(point)
    return math.nan if value is None else float(value)


def _intervals(
    methods: list[str], x: Array, y: Array, resamples: int, seed: int
) -> tuple[Interval | None, Interval | None]:
    """Intervals of Pearson's and of Spearman's coefficient."""
    names, method_of = np.unique(methods, return_inverse=True)
    if len(x) < _FEWEST_FOR_INTERVAL or len(names) < _FEWEST:
        return None, None
    share = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), share, size=resamples)
    counts = drawn[:, method_of].astype(np.float64)
    usable = _varies(x, counts) & _varies(y, counts)
    if not usable.any():
        return None, None
    counts = counts[usable]
    ranks = _ranks(x, counts), _ranks(y, counts)
    return _percentiles(_pearson(x, y, counts)), _percentiles(_pearson(*ranks, counts))


def _varies(values: Array, counts: Array) -> NDArray[np.bool_]:
    """Whether a resample holds more than one value; `(resamples,)`."""
    drawn = np.where(counts > 0, values, np.nan)
    return np.asarray(np.nanmax(drawn, axis=1) > np.nanmin(drawn, axis=1))


def _pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's coefficient of resamples in which model i occurs `counts[:, i]` times."""
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    products = [(counts * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y))]
    return np.asarray(np.clip(products[0] / np.sqrt(products[1] * products[2]), -1, 1))


def _ranks(values: Array, counts: Array) -> Array:
    """Ranks within each resample, ties at their middle, `(resamples, n)`.

    Copies of a model are ties as well: they stand between all that is smaller and all that is not.
    """
    distinct, index = np.unique(values, return_inverse=True)
    tied = counts @ (index[:, None] == np.arange(len(distinct)))
    return np.asarray((np.cumsum(tied, axis=1) - tied / 2)[:, index])


def _percentiles(coefficients: Array) -> Interval:
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(coefficients, (tail, 100 - tail))
    return float(low), float(high)
