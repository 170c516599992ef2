"""Whether a network that was trained on single-step attacks withstands more than these."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import PGD, example_losses
from robust_flatness.functional.evaluation import Model, logits_function, to_float64
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.robust_loss import estimate_text, measure_robustness
from robust_flatness.measures.base import AttackMeasure, Examples


@dataclass(frozen=True)
class SingleStepResult:
    """Predictions under FGSM and PGD, and alignment of gradients, of each example, `(N,)` each.

    Attributes:
        fgsm_correct: Whether the clean image and its FGSM example are classified correctly.
        pgd_correct: Whether the clean image and the PGD examples of all restarts are.
        alignments: Cosine of two input gradients, in [-1, 1], see `gradient_alignments`.
    """

    fgsm_correct: Tensor
    pgd_correct: Tensor
    alignments: Tensor

    def __repr__(self) -> str:
        """One line: errors and alignment with their standard errors over examples."""
        fgsm, pgd = (
            estimate_text(~correct, percent=True)
            for correct in (self.fgsm_correct, self.pgd_correct)
        )
        return (
            f"error under FGSM {fgsm}, under PGD {pgd}, gradient alignment "
            f"{estimate_text(self.alignments)} ({len(self.alignments)} examples)"
        )

    @property
    def fgsm_error(self) -> float:
        """Share of examples misclassified clean or under FGSM, in [0, 1]."""
        return 1 - self.fgsm_correct.double().mean().item()

    @property
    def pgd_error(self) -> float:
        """Share of examples misclassified clean or under PGD, in [0, 1]."""
        return 1 - self.pgd_correct.double().mean().item()

    @property
    def alignment(self) -> float:
        """Mean alignment, in [-1, 1]; near 1 if the loss is linear in the ball."""
        return self.alignments.double().mean().item()


@dataclass(kw_only=True)
class SingleStepRobustness(AttackMeasure):
    """RErr under FGSM and under PGD, and gradient alignment (Andriushchenko and Flammarion, 2020).

    Catastrophic overfitting (Wong et al., 2020) is a low error under FGSM, one step of length ε
    from the image, at a high one under PGD and a low alignment. Metrics are
    `single_step/fgsm_error/test`, `single_step/pgd_error/test` and `gradient/alignment/test`.

    Args:
        step_size: Length of a step of PGD; None takes ε/4, as these papers do. Steps of nearly ε
            stay near the corners of the ball, where a network with catastrophic overfitting is
            robust.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> result = SingleStepRobustness(eps=0.1)(linear, images, torch.arange(4) % 2)
        >>> round(result.alignment, 4)
        1.0
    """

    @property
    @override
    def pgd(self) -> PGD:
        pgd = super().pgd
        return pgd if self.step_size is not None else replace(pgd, step_size=pgd.eps / 4)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> SingleStepResult:
        attacked = self.attacked(examples)
        pgd = attacked.pgd
        robustness = measure_robustness(network, attacked, examples.known)
        fgsm = replace(
            attacked, pgd=replace(pgd, steps=1, step_size=pgd.eps, start="zero"), restarts=1
        )
        # The image plus noise is not clamped to the box, as in the authors' code.
        noise = replace(attacked, pgd=replace(pgd, start="uniform"))
        correct = [robustness.clean_correct.new_zeros(0)]
        alignments = [to_float64(robustness.clean_losses.new_zeros(0))]
        for part in attacked.batches:
            images, labels = attacked.images[part], attacked.labels[part]
            correct.append(fgsm.attack(network, part)[1])
            starts = noise.starts(part, restart=0)
            alignments += fitting(partial(gradient_alignments, network), images, labels, starts)
        return SingleStepResult(
            torch.cat(correct) & robustness.clean_correct,
            robustness.robust_correct,
            torch.cat(alignments),
        )

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        names = ("single_step/fgsm_error", "single_step/pgd_error", "gradient/alignment")
        return tuple(f"{name}/{split}" for name in names)

    @override
    def values(self, result: SingleStepResult) -> tuple[float, ...]:
        return result.fgsm_error, result.pgd_error, result.alignment

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return f"FGSM and PGD-{self.steps}", self.restarts + 1

    @override
    def passes(self) -> tuple[int, int]:
        # Clean images, PGD, FGSM, two gradients.
        return 1 + self.restarts * (self.steps + 1) + 4, self.restarts * self.steps + 3


def gradient_alignments(model: Model, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Cosine of the gradients of the loss at the image and at image plus noise, `(N,)`.

    It is 1 if the loss is linear between the two, and 0 if a gradient is zero. Sec. 3.2 of
    Andriushchenko and Flammarion (2020), who take uniform noise in the ball.

    Args:
        model: Maps images to logits `(N, K)`; its modes are not changed.
        images: `(N, C, H, W)`.
        labels: Classes `(N,)`.
        noise: `(N, C, H, W)`.
    """
    logits = logits_function(model, images)
    directions = []
    for inputs in (images, images + noise.to(images)):
        inputs = inputs.detach().clone().requires_grad_()
        loss = example_losses(logits(inputs), labels).sum()
        (gradient,) = torch.autograd.grad(loss, inputs)
        flat = to_float64(gradient).flatten(1)
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        directions.append(flat / norm.clamp_min(torch.finfo(torch.float64).tiny))
    return (directions[0] * directions[1]).sum(1)
