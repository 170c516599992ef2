"""TRADES and TRADES-AWP: agreement under attack beside accuracy on clean images."""

from typing import Any

from torch import Tensor

from robust_flatness.functional.checks import check_choice, check_number
from robust_flatness.functional.evaluation import to_float32
from robust_flatness.functional.objectives import TRADES_STARTS, divergences
from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.lightning_modules.pgd_mixin import ObjectiveTerms


class TRADES(AT):
    """Cross-entropy on clean images plus λ KL(p ‖ q) under attack (Zhang et al., 2019).

    The attack raises the divergence from the clean prediction, which is computed once in eval mode.
    It starts where the paper's attacks do; `start="gaussian"` is the original's, and `zero` is
    refused, as the divergence has no gradient there. Clean and adversarial batches are separate
    forwards, so BatchNorm sees one after the other, and gradients flow through both. The iterate
    that is kept is the best of each example; the paper's code keeps that of the whole batch.

    Args:
        lam: Weight λ of the divergence; 6 in Table 1, swept over 1, 3, 6 and 9.
        args, kwargs: Arguments of `AT`.

    Raises:
        ValueError: If `lam` is negative, the attack starts at zero, or `incorrect` is `predicted`,
            as predictions are attacked in any case.

    Example:
        >>> TRADES(lam=3.0).lam
        3.0
    """

    def __init__(self, *args: Any, lam: float = 6.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("lam", lam)
        self.lam = lam
        self.check_attack()

    def check_attack(self) -> None:
        """Refuses settings that mean nothing to an attack on the divergence."""
        check_choice("start", self.pgd.start, TRADES_STARTS)
        check_choice("incorrect", self.incorrect, ("attack", "ignore"))

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Examples whose prediction diverges from the clean one; `labels` are not used."""
        return self.craft(images, self.clean_logits(images), divergences)

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """Clean cross-entropy plus λ times the mean divergence."""
        clean, logits = to_float32(self(images)), to_float32(self(adversarial))
        loss = self.training_labels.loss(clean, labels)
        divergence = divergences(logits, clean)
        return loss + self.lam * divergence.mean(), logits, {"train/divergence": divergence}


class TRADESAWP(AWPMixin, TRADES):
    """TRADES at weights that are perturbed against its own objective (Wu et al., 2020).

    Wu et al. perturb TRADES half as far as AT, after 10 of 200 epochs of warm-up; so do these
    defaults.

    Args:
        xi: Relative length ξ.
        warmup: Share of training before weights are perturbed.
        args, kwargs: Arguments of `AWPMixin` and of `TRADES`.

    Example:
        >>> TRADESAWP(xi=0.01, lam=3.0).lam
        3.0
    """

    def __init__(self, *args: Any, xi: float = 0.005, warmup: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, xi=xi, warmup=warmup, **kwargs)
