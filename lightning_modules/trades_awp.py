"""TRADES-AWP: TRADES with adversarial weight perturbations."""

from typing import Any

from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.lightning_modules.trades import TRADES


class TRADESAWP(AWPMixin, TRADES):
    """TRADES at weights that are perturbed against its own objective (Wu et al., 2020).

    Wu et al. perturb TRADES half as far as AT, after 10 of 200 epochs of warm-up; so do these
    defaults.

    Args:
        xi: Relative length ξ.
        warmup: Share of training before weights are perturbed.
        args: The network, as the first argument of `AT`.
        kwargs: Arguments of `AWPMixin` and of `TRADES`.

    Example:
        >>> TRADESAWP(xi=0.01, lam=3.0).lam
        3.0
    """

    def __init__(self, *args: Any, xi: float = 0.005, warmup: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, xi=xi, warmup=warmup, **kwargs)
