"""Activation functions by name, so that a network's activation is one word in a configuration."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

Activation: TypeAlias = Literal["relu", "silu", "gelu", "mish"]
"""Names that `make_activation` knows. The paper compares all four."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    # Out of place: a hook on the layer before keeps the values that it saw.
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    # The exact GELU, as in the paper's code; its text has the approximation x * sigmoid(1.702 x).
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


def make_activation(name: Activation) -> nn.Module:
    """Build the activation called `name`.

    Args:
        name: one of `"relu"`, `"silu"`, `"gelu"` and `"mish"`.

    Returns:
        A module without parameters that works element by element.

    Raises:
        ValueError: if there is no activation of that name.

    Example:
        >>> make_activation("silu")
        SiLU()
    """
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"Expected `activation` to be one of {list(_ACTIVATIONS)} but got {name!r}."
        )
    return _ACTIVATIONS[name]()
