"""Curvature of the clean loss."""

from dataclasses import asdict, dataclass

from torch import nn
from typing_extensions import override

from robust_flatness.functional.checks import check_number
from robust_flatness.functional.hessian import HessianResult, hessian_extreme_eigenvalues
from robust_flatness.measures.base import Examples, Measure


@dataclass(kw_only=True)
class Curvature(Measure):
    """Extreme eigenvalues of the Hessian of the mean clean loss.

    Metrics are `hessian/max_eigenvalue`, `hessian/min_eigenvalue` and `hessian/convexity`,
    |λ_min| / |λ_max|; for another split than `test`, `hessian/train/max_eigenvalue` and so on. The
    paper sums four mean losses, so that its eigenvalues are about four times these. Eigenvalues
    depend on the scale of layers that a BatchNorm follows; flatness does not.

    Lanczos stops when it has converged, so processes do not share it out: each computes on all
    images.

    Args:
        tolerance: Relative tolerance of Lanczos, see `functional.hessian_extreme_eigenvalues`.
    """

    tolerance: float = 1e-3
    moves_weights = True
    whole_set = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tolerance", self.tolerance, low=1e-12, high=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> HessianResult:
        arguments = asdict(self)
        return hessian_extreme_eigenvalues(network, examples.images, examples.labels, **arguments)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        prefix = "hessian" if split == "test" else f"hessian/{split}"
        names = ("max_eigenvalue", "min_eigenvalue", "convexity")
        return tuple(f"{prefix}/{name}" for name in names)

    @override
    def values(self, result: HessianResult) -> tuple[float | None, ...]:
        ratio = None if result.max_eigenvalue == 0 else result.convexity_ratio
        return result.max_eigenvalue, result.min_eigenvalue, ratio
