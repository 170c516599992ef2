"""MART: examples that are misclassified when clean count more."""

from typing import Any

from torch import Tensor

from robust_flatness.functional.checks import check_number
from robust_flatness.functional.evaluation import to_float32
from robust_flatness.functional.objectives import margins, weighted_divergences
from robust_flatness.lightning_modules.at import AT


class MART(AT):
    """Boosted cross-entropy under attack plus λ KL(p ‖ q) (1 - p_y) (Wang et al., 2020).

    The attack raises cross-entropy. Clean and adversarial batches are forwards of their own, and
    gradients flow through both and through the weight 1 - p_y, as in the original code. Label
    smoothing applies to the cross-entropy, not to the margin.

    Args:
        lam: Weight λ of the divergence; 6 in Table 1, swept over 1, 3, 6 and 9.
        args: The network, as the first argument of `AT`.
        kwargs: Arguments of `AT`.

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

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boosted cross-entropy plus λ times the mean weighted divergence; adversarial logits."""
        clean, logits = to_float32(self(images)), to_float32(self(adversarial))
        divergence = weighted_divergences(clean, logits, labels)
        self.means.add("train/weighted_divergence", divergence)
        boosted = self.training_labels.loss(logits, labels) + margins(logits, labels).mean()
        return boosted + self.lam * divergence.mean(), logits
