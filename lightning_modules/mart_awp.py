"""MART-AWP: MART with adversarial weight perturbations."""

from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.lightning_modules.mart import MART


class MARTAWP(AWPMixin, MART):
    """MART at weights that are perturbed against its own objective (Wu et al., 2020).

    Args are those of `AWPMixin` and of `MART`.

    Example:
        >>> MARTAWP(xi=0.005).xi
        0.005
    """
