"""Models as the page draws them: figures under their names, differences of figures among them.

Example:
    >>> FIGURES["test/robust_error"], number("test/robust_error", 0.5251234567)
    (('RErr by PGD', '%'), 52.5123)
"""

from robust_flatness.reporting.models import Model, Point
from robust_flatness.reporting.runs import Weights

# Name, and its label and unit; losses in nats and flatness stand without a unit.
FIGURES: dict[str, tuple[str, str]] = {
    "test/robust_loss": ("RLoss on test images", ""),
    "test/robust_error": ("RErr by PGD", "%"),
    "test/autoattack_error": ("RErr by AutoAttack", "%"),
    "test/error": ("clean error", "%"),
    "train_eval/robust_loss": ("RLoss on training images", ""),
    "train_eval/robust_error": ("RErr by PGD on training images", "%"),
    "train/autoattack_error": ("RErr by AutoAttack on training images", "%"),
    "flatness/average/test": ("average-case flatness", ""),
    "flatness/worst/test": ("worst-case flatness", ""),
    "flatness/average/train": ("average-case flatness on training images", ""),
    "flatness/clean_average/test": ("average-case flatness of the clean loss", ""),
    "hessian/max_eigenvalue": ("largest eigenvalue of the Hessian", ""),
    "gap/robust_loss": ("test − training RLoss", ""),
    "last_minus_best/robust_loss": ("last − early-stopped RLoss", ""),
}


def number(name: str, value: float) -> float:
    """A figure as the page holds it: errors in percent, six digits."""
    return float(f"{100 * value if name.endswith('error') else value:.6g}")


class PagePoint:
    """A point, with figures that others give rise to.

    Args:
        point: A model that we or others trained.
    """

    def __init__(self, point: Point) -> None:
        self._point = point
        self.method = point.method
        self.label = point.label
        self.source = str(getattr(point, "source", ""))
        self.statistic = str(getattr(point, "statistic", ""))

    def mean(self, name: str, weights: Weights = "final") -> float | None:
        """The mean over seeds; errors as shares, None where it was not measured."""
        if name == "gap/robust_loss":
            train = self._point.mean("train_eval/robust_loss", weights)
            return _difference(self._point.mean("test/robust_loss", weights), train)
        if name == "last_minus_best/robust_loss":
            if weights == "early_stopped":
                return None
            best = self._point.mean("test/robust_loss", "early_stopped")
            return _difference(self._point.mean("test/robust_loss"), best)
        return self._point.mean(name, weights)

    def deviation(self, name: str, weights: Weights = "final") -> float | None:
        """The standard deviation over seeds of a figure that was measured itself."""
        return self._point.deviation(name, weights) if isinstance(self._point, Model) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
