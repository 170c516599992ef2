"""Trace of the Hessian."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from robust_flatness.functional.checks import check_count
from robust_flatness.functional.hessian import HessianTraceResult, hessian_trace
from robust_flatness.functional.robust_loss import LossKind
from robust_flatness.measures.base import Examples, FixedExamplesMeasure


@dataclass(kw_only=True)
class HessianTrace(FixedExamplesMeasure):
    """Trace of the Hessian of the mean clean loss, with its standard error over random vectors.

    Metrics are `hessian/trace`, `hessian/trace_sem`, and the trace relative to the weights,
    `hessian/scale_free_trace` and `hessian/scale_free_trace_sem`; for another split than `test`,
    `hessian/train/trace` and so on; for adversarial examples `hessian/robust_trace` and so on. See
    `functional.hessian_trace`. Each process computes on all images, as for `Curvature`.

    Args:
        num_probes: Number of random vectors.
        loss: `clean`, or `robust`: the curvature at fixed adversarial examples, which is not that
            of RLoss, as these move with the weights.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> HessianTrace(num_probes=4)(network, images, torch.arange(4)).trace > 0
        True
    """

    num_probes: int = 50
    loss: LossKind = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_probes", self.num_probes, low=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> HessianTraceResult:
        return hessian_trace(
            network,
            self.adversarial(network, examples),
            examples.labels,
            num_probes=self.num_probes,
            seed=self.seed,
            batch_size=self.batch_size,
        )

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        prefix = "hessian" if split == "test" else f"hessian/{split}"
        kind = "" if self.loss == "clean" else "robust_"
        names = [f"{prefix}/{kind}{name}" for name in ("trace", "scale_free_trace")]
        return (*names, *(f"{name}_sem" for name in names if self.num_probes > 1))

    @override
    def values(self, result: HessianTraceResult) -> tuple[float, ...]:
        errors = (result.trace_standard_error, result.scale_free_standard_error)
        return (
            result.trace,
            result.scale_free_trace,
            *(error for error in errors if self.num_probes > 1),
        )

    @override
    def weight_passes(self) -> tuple[int, int]:
        return 1, 1 + 2 * self.num_probes
