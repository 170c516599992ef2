"""Worst-case flatness."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import Keep
from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.robust_loss import LossKind
from robust_flatness.functional.worst_case_flatness import (
    WorstCaseFlatnessResult,
    measure_worst_case_flatness,
)
from robust_flatness.measures.base import AttackMeasure, Examples


@dataclass(kw_only=True)
class WorstCaseFlatness(AttackMeasure):
    """How much RLoss rises if weights move in the worst direction; lower is flatter.

    The metric is `flatness/worst/test`, or `flatness/clean_worst/test` for the clean loss. The
    defaults are those of the paper's tables: 20 steps of joint ascent, 10 restarts and ξ = 0.003.
    That costs about twice what the average case does.

    Args:
        xi: Relative radius ξ of the perturbation in each layer.
        weight_step: Length of a step on the weights, relative to each layer.
        loss: `robust`, or `clean` for the loss of the images themselves.
        keep: `last` or `best` iterate; None is the paper's, see `functional.worst_case_flatness`.
        per_batch: Whether each batch has a perturbation of its own.
        steps: Number of steps of the joint ascent and of the reference attack, at least 1.
        restarts: Number of restarts of both.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> flat = WorstCaseFlatness(xi=0.1, eps=0.1, steps=5, restarts=2)
        >>> flat(network, images, torch.arange(4)).value > 0
        True
    """

    xi: float = 0.003
    weight_step: float = 0.01
    loss: LossKind = "robust"
    keep: Keep | None = None
    per_batch: bool = False
    steps: int = 20
    restarts: int = 10
    moves_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("xi", self.xi)
        check_number("weight_step", self.weight_step)
        check_count("steps", self.steps, low=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> WorstCaseFlatnessResult:
        return measure_worst_case_flatness(
            network,
            self.attacked(examples),
            sharing=examples.sharing,
            known=examples.known,
            **self.own_arguments,
        )

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        kind = "worst" if self.loss == "robust" else "clean_worst"
        return (f"flatness/{kind}/{split}",)

    @override
    def values(self, result: WorstCaseFlatnessResult) -> tuple[float, ...]:
        return (result.value,)

    @override
    def arrays(self, result: WorstCaseFlatnessResult, split: str) -> dict[str, Tensor]:
        return {self.metric_names(split)[0]: result.increases[result.worst_restart]}

    @property
    @override
    def progress(self) -> tuple[str, int]:
        reference = self.restarts if self.loss == "robust" else 1
        text = f"worst-case flatness, {self.restarts} × {self.steps} steps"
        return text, reference + self.restarts

    @override
    def passes(self) -> tuple[int, int]:
        forward, backward = super().passes()
        # The reference is a forward of the images themselves.
        steps = self.steps if self.loss == "clean" else 0
        return forward - steps, backward - steps
