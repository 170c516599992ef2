"""Adaptive sharpness."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.noise import Norm
from robust_flatness.functional.robust_loss import LossKind
from robust_flatness.functional.sharpness import (
    Case,
    Parameters,
    SharpnessResult,
    check_sharpness,
    measure_sharpness,
)
from robust_flatness.measures.base import AttackMeasure, Examples


@dataclass(kw_only=True)
class AdaptiveSharpness(AttackMeasure):
    """How much RLoss rises if each weight moves relative to its own size; lower is flatter.

    Metrics are `sharpness/adaptive_average/test`, with the standard error over draws,
    `sharpness/adaptive_average/test_sem`, or `sharpness/adaptive_worst/test`; for the clean loss
    `sharpness/clean_adaptive_average/…` and so on. See `functional.adaptive_sharpness`.

    Args:
        case: `average` over random perturbations, or the `worst` one by APGD.
        weight_norm: `linf` or `l2` ball of perturbations.
        rho: Relative radius ρ; None takes 0.2 and 0.1 for `average`, 0.002 and 0.5 for `worst`,
            with `linf` and `l2`.
        num_perturbations: Number of draws of the average case.
        weight_steps: Number of steps of the worst case.
        parameters: `weights` of convolutions and linear layers with their biases, or `all`, those
            of normalization layers included.
        normalize_logits: Whether logits have mean 0 and norm 1 in the loss; images are attacked
            with the logits as they are.
        eta: Added to the size of each weight.
        loss: `robust`, or `clean` for the loss of the images themselves.
        batch_size: Number m of images that share a perturbation, part of the definition.
        steps: Number of steps of each attack on images.
        restarts: Number of restarts of each attack.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> sharpness = AdaptiveSharpness(case="worst", loss="clean", rho=0.1)
        >>> sharpness(network, images, torch.arange(4)).value > 0
        True
    """

    case: Case = "average"
    weight_norm: Norm = "linf"
    rho: float | None = None
    num_perturbations: int = 20
    weight_steps: int = 20
    parameters: Parameters = "weights"
    normalize_logits: bool = False
    eta: float = 0.0
    loss: LossKind = "robust"
    moves_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sharpness(
            self.case,
            self.weight_norm,
            self.rho,
            self.num_perturbations,
            self.weight_steps,
            self.eta,
        )

    @override
    def measure(self, network: nn.Module, examples: Examples) -> SharpnessResult:
        return measure_sharpness(network, self.attacked(examples), **self.own_arguments)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        name = f"sharpness/{'clean_' if self.loss == 'clean' else ''}adaptive_{self.case}/{split}"
        return (name, f"{name}_sem") if self._draws > 1 else (name,)

    @override
    def values(self, result: SharpnessResult) -> tuple[float, ...]:
        return (result.value, result.standard_error)[: 1 + (self._draws > 1)]

    @override
    def arrays(self, result: SharpnessResult, split: str) -> dict[str, Tensor]:
        return {self.metric_names(split)[0]: result.increases.mean(dim=0)}

    @property
    def _draws(self) -> int:
        return self.num_perturbations if self.case == "average" else 1

    @property
    def _evaluations(self) -> int:
        return 1 + (self._draws if self.case == "average" else self.weight_steps)

    @property
    @override
    def progress(self) -> tuple[str, int]:
        restarts = 1 if self.loss == "clean" else self.restarts
        attack = "clean" if self.loss == "clean" else f"PGD-{self.steps} × {restarts} restarts"
        text = f"{self.case}-case sharpness, {self._evaluations - 1} × {attack}"
        return text, self._evaluations * restarts

    @override
    def passes(self) -> tuple[int, int]:
        # The attack knows the losses of plain logits, in the average case all that is needed.
        apart = self.case == "worst" or self.normalize_logits or self.loss == "clean"
        attacks = self.loss == "robust" and (self.steps > 0 or not apart)
        forward, backward = super().passes() if attacks else (0, 0)
        ascent = self.weight_steps if self.case == "worst" else 0
        return forward + self._evaluations * apart, backward + ascent
