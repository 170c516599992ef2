"""PGD that does not go further than it must (Zhang et al., 2020, "Attacks which do not kill")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_count, predicted_classes, upcast
from robust_flatness.functional.iterate import Criterion, Iterate, example_losses
from robust_flatness.functional.logits import logits_function
from robust_flatness.functional.modes import Model, differentiable


@dataclass(frozen=True)
class FriendlyPGD(PGD):
    """PGD-τ: keeps the iterate that is misclassified for the (τ+1)-th time, or the last before.

    The paper's rows PGD-7-0 to PGD-7-3. As in the paper's code an example that no iterate fools
    stays clean; Zhang et al. keep its last iterate.

    Args:
        tau: How many more misclassified iterates τ are gone through after the first.

    Other args are those of `PGD`; `keep` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> FriendlyPGD(eps=0.1, tau=1).tau
        1
    """

    tau: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tau", self.tau)

    def attack(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        criterion: Criterion = example_losses,
    ) -> Iterate:
        """Runs the attack from given perturbations; n steps cost n + 1 forwards, n backwards.

        Args:
            model: Maps images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
            images: The clean images; never modified.
            labels: Classes `(N,)`, or logits or probabilities `(N, K)` of the class to leave.
            start: Perturbations `(N, C, H, W)`, projected before use.
            criterion: Maps logits and labels to the losses `(N,)` to be raised.

        Returns:
            The kept iterate of each example, without a graph.
        """
        with differentiable(model, self.mode):
            network = logits_function(model, images)
            images, labels = upcast(images.detach()).clone(), labels.clone()
            classes = labels if labels.ndim == 1 else predicted_classes(labels)
            adversarial = self.begin(images, start)
            kept, fooled = images, torch.zeros(len(images), dtype=torch.long, device=images.device)
            for _ in range(self.steps):
                adversarial.requires_grad_()
                logits = network(adversarial)
                (gradient,) = torch.autograd.grad(criterion(logits, labels).sum(), adversarial)
                adversarial = adversarial.detach()
                kept, fooled = self._keep(kept, fooled, adversarial, logits, classes)
                adversarial = self.move(adversarial, gradient, images)
            if self.steps:
                with torch.no_grad():
                    logits = network(adversarial)
                kept, fooled = self._keep(kept, fooled, adversarial, logits, classes)
            return Iterate(kept, None, None)

    def _keep(
        self, kept: Tensor, fooled: Tensor, adversarial: Tensor, logits: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        predicted = predicted_classes(logits.detach())
        # The prediction to leave may be undefined as well.
        wrong = (predicted != classes) | (predicted < 0)
        take = wrong & (fooled <= self.tau)
        shape = (-1, *[1] * (kept.ndim - 1))
        return torch.where(take.view(shape), adversarial, kept), fooled + wrong
