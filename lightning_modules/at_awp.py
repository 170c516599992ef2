"""AT-AWP: adversarial training with adversarial weight perturbations."""

from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.awp_mixin import AWPMixin


class ATAWP(AWPMixin, AT):
    """Adversarial training at adversarially perturbed weights (Wu et al., 2020; Table 1, AT-AWP).

    Args are those of `AWPMixin` and of `AT`.

    Example:
        >>> ATAWP(xi=0.005).xi
        0.005
    """
