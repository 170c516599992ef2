"""Norm of the gradient with respect to the weights."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from robust_flatness.functional.gradient_norm import GradientNormResult, gradient_norm
from robust_flatness.measures.base import Examples, FixedExamplesMeasure


@dataclass(kw_only=True)
class GradientNorm(FixedExamplesMeasure):
    """Norm of the gradient of RLoss with respect to the weights, absolute and relative to them.

    Metrics are `gradient/norm/test`, ‖g‖, and `gradient/relative_norm/test`, Σ_l ‖w_l‖‖g_l‖; for
    the clean loss `gradient/clean_norm/…` and so on. The relative one is the slope of worst-case
    flatness in ξ, see `functional.gradient_norm`.

    Args:
        loss: `robust`, at the adversarial examples of the weights, or `clean`.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> GradientNorm(eps=0.1)(network, images, torch.arange(4)).norm > 0
        True
    """

    @override
    def measure(self, network: nn.Module, examples: Examples) -> GradientNormResult:
        images = self.adversarial(network, examples)
        return gradient_norm(network, images, examples.labels, batch_size=self.batch_size)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        kind = "clean_" if self.loss == "clean" else ""
        return f"gradient/{kind}norm/{split}", f"gradient/{kind}relative_norm/{split}"

    @override
    def values(self, result: GradientNormResult) -> tuple[float, ...]:
        return result.norm, result.relative_norm

    @override
    def weight_passes(self) -> tuple[int, int]:
        return 1, 1
