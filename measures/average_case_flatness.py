"""Average-case flatness."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.flatness import (
    PAPER_REFERENCE_RESTARTS,
    FlatnessResult,
    Protocol,
    measure_flatness,
)
from robust_flatness.functional.robust_loss import LossKind
from robust_flatness.functional.weight_perturbation import Distribution, RelativeTo
from robust_flatness.measures.base import AttackMeasure, Examples


@dataclass(kw_only=True)
class AverageCaseFlatness(AttackMeasure):
    """How much RLoss rises if weights move in random directions (Eq. 1); lower is flatter.

    Metrics are `flatness/average/test` and, of several directions, the standard error over them,
    `flatness/average/test_sem`; for the clean loss `flatness/clean_average/…`. The defaults are
    the paper's: PGD-20, 10 directions and ξ = 0.5.

    Args:
        num_perturbations: Number of random directions.
        xi: Relative length ξ of a perturbation in each layer.
        protocol: `shared` or `paper`, see `functional.average_case_flatness`.
        loss: `robust`, or `clean` for the loss of the images themselves.
        distribution: `sphere` or `ball`, see `functional.sample_weight_perturbation`.
        relative_to: `layer`, `filter` or `network`, see `functional.sample_weight_perturbation`.
        per_batch: Whether each batch has directions of its own.
        steps: Number of steps of the attack.
        restarts: Number of restarts, for reference and perturbed losses alike.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> AverageCaseFlatness(xi=0.0, eps=0.1)(network, images, torch.arange(4)).value
        0.0
    """

    num_perturbations: int = 10
    xi: float = 0.5
    protocol: Protocol = "shared"
    loss: LossKind = "robust"
    distribution: Distribution = "sphere"
    relative_to: RelativeTo = "layer"
    per_batch: bool = False
    steps: int = 20
    moves_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_perturbations", self.num_perturbations, low=1)
        check_number("xi", self.xi)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> FlatnessResult:
        attacked = self.attacked(examples)
        return measure_flatness(network, attacked, known=examples.known, **self.own_arguments)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        kind = "average" if self.loss == "robust" else "clean_average"
        name = f"flatness/{kind}/{split}"
        return (name, f"{name}_sem") if self.num_perturbations > 1 else (name,)

    @override
    def values(self, result: FlatnessResult) -> tuple[float, ...]:
        return result.value, result.standard_error

    @override
    def arrays(self, result: FlatnessResult, split: str) -> dict[str, Tensor]:
        return {self.metric_names(split)[0]: result.increases.mean(dim=0)}

    @property
    @override
    def progress(self) -> tuple[str, int]:
        reference, restarts = self.restarts, self.restarts
        if self.loss == "clean":
            reference, restarts = 1, 1
        elif self.protocol == "paper":
            reference, restarts = PAPER_REFERENCE_RESTARTS, 1
        attack = "clean" if self.loss == "clean" else f"PGD-{self.steps} × {restarts} restarts"
        text = f"flatness, {self.num_perturbations} directions × {attack}"
        return text, reference + self.num_perturbations * restarts

    @override
    def passes(self) -> tuple[int, int]:
        return (self.progress[1], 0) if self.loss == "clean" else super().passes()
