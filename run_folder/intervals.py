"""How sure an error is that was counted on a few hundred images."""


def error_interval(errors: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's interval of an error that was counted on `n` independent images.

    It stays inside [0, 1] and keeps its level near both ends, where the usual
    `p ± 1.96 sqrt(p (1 - p) / n)` does not.

    Args:
        errors: Number of misclassified images.
        n: Number of images.
        level: How often such intervals hold the true error.

    Returns:
        The lower and the upper end, as shares of 1.

    Raises:
        ValueError: If `n` is below 1, `errors` is outside `[0, n]` or `level` is not within (0, 1).

    Example:
        >>> low, high = error_interval(610, 1000)
        >>> f"{low:.3f} to {high:.3f}"
        '0.579 to 0.640'
    """
    if n < 1:
        raise ValueError(f"Expected `n` to be >= 1 but got {n}.")
    if not 0 <= errors <= n:
        raise ValueError(f"Expected `errors` to be in [0, {n}] but got {errors}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be within (0, 1) but got {level}.")
    # Here and not above, since it takes a second that few callers of this package need to wait for.
    from scipy.stats import binomtest

    interval = binomtest(errors, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)
