"""First-order flatness."""

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.gradient_norm import (
    FirstOrderFlatnessResult,
    first_order_flatness,
)
from robust_flatness.measures.base import Examples, FixedExamplesMeasure


@dataclass(kw_only=True)
class FirstOrderFlatness(FixedExamplesMeasure):
    """Largest gradient of RLoss near the weights, times the radius (GAM); lower is flatter.

    The metric is `flatness/first_order/test`, or `flatness/clean_first_order/test` for the clean
    loss, see `functional.first_order_flatness`.

    Args:
        rho: Radius ρ of the ball of weights, in units of weights.
        weight_steps: Number of steps of the ascent.
        loss: `robust`, at the adversarial examples of the weights, or `clean`.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> FirstOrderFlatness(loss="clean")(network, images, torch.arange(4)).value > 0
        True
    """

    rho: float = 0.1
    weight_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho)
        check_count("weight_steps", self.weight_steps, low=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> FirstOrderFlatnessResult:
        return first_order_flatness(
            network,
            self.adversarial(network, examples),
            examples.labels,
            rho=self.rho,
            weight_steps=self.weight_steps,
            seed=self.seed,
            batch_size=self.batch_size,
        )

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        kind = "clean_first_order" if self.loss == "clean" else "first_order"
        return (f"flatness/{kind}/{split}",)

    @override
    def values(self, result: FirstOrderFlatnessResult) -> tuple[float, ...]:
        return (result.value,)

    @override
    def weight_passes(self) -> tuple[int, int]:
        return 2 * self.weight_steps + 1, 3 * self.weight_steps + 1
