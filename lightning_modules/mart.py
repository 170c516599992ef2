"""MART and MART-AWP: examples that are misclassified when clean count more."""

from typing import Any

from torch import Tensor

from robust_flatness.functional.checks import check_number
from robust_flatness.functional.evaluation import to_float32
from robust_flatness.functional.objectives import margin_losses, weighted_divergences
from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.lightning_modules.pgd_mixin import ObjectiveTerms


class MART(AT):
    """Boosted cross-entropy under attack plus λ KL(p ‖ q) (1 - p_y) (Wang et al., 2020).

    The attack raises cross-entropy. Clean and adversarial batches are separate forwards, and
    gradients flow through both and through the weight 1 - p_y, as in the original code. Label
    smoothing applies to the cross-entropy, not to the margin.

    Args:
        lam: Weight λ of the divergence; 6 in Table 1, swept over 1, 3, 6 and 9.
        args, kwargs: Arguments of `AT`.

    Raises:
        ValueError: If `lam` is negative.

    Example:
        >>> MART(lam=3.0).lam
        3.0
    """

    def __init__(self, *args: Any, lam: float = 6.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("lam", lam)
        self.lam = lam

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """Boosted cross-entropy plus λ times the mean weighted divergence."""
        clean, logits = to_float32(self(images)), to_float32(self(adversarial))
        divergence = weighted_divergences(clean, logits, labels)
        boosted = self.training_labels.loss(logits, labels) + margin_losses(logits, labels).mean()
        loss = boosted + self.lam * divergence.mean()
        return loss, logits, {"train/weighted_divergence": divergence}


class MARTAWP(AWPMixin, MART):
    """MART at weights that are perturbed against its own objective (Wu et al., 2020).

    Args are those of `AWPMixin` and of `MART`.

    Example:
        >>> MARTAWP(xi=0.005).xi
        0.005
    """
