"""Normalisation layers by name, so that the choice is one word in a configuration."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

from robust_flatness.networks.reparameterized_batch_norm import ReparameterizedBatchNorm2d

Norm: TypeAlias = Literal["reparameterized", "batch"]
"""Names that `make_norm` knows: the paper's normalisation, and the usual one."""

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "reparameterized": ReparameterizedBatchNorm2d,
    "batch": nn.BatchNorm2d,
}


def make_norm(name: Norm, num_features: int) -> nn.Module:
    """Build the normalisation called `name` for `num_features` channels.

    Args:
        name: `"reparameterized"` (scale `1 + weight`) or `"batch"` (scale `weight`).
        num_features: number of channels.

    Returns:
        A module on activations `(N, num_features, H, W)`.

    Raises:
        ValueError: if there is no normalisation of that name.

    Example:
        >>> type(make_norm("batch", 16))
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    if name not in _NORMS:
        raise ValueError(f"Expected `norm` to be one of {list(_NORMS)} but got {name!r}.")
    return _NORMS[name](num_features)
