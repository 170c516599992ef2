"""Annotations that the command line gives a meaning of its own."""

import math
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Eps = float
else:

    class Eps(float):
        """A number that the command line and YAML also take as a fraction such as `8/255`."""


def read_number(value: Any) -> float:
    """A number, or a fraction written as text.

    Args:
        value: Say `0.1`, `"1e-3"` or `"8/255"`.

    Raises:
        ValueError: If it is neither, or not finite.

    Example:
        >>> read_number("51/255")
        0.2
    """
    text = str(value)
    with suppress(ValueError, ZeroDivisionError):
        # Digits of other scripts are numbers to Python, but rather a slip of the keyboard.
        if isinstance(value, (int, float, str)) and text.isascii() and "_" not in text:
            above, _, below = text.partition("/")
            number = float(above) / float(below) if "/" in text else float(text)
            if math.isfinite(number):
                return number
    raise ValueError(f"Expected a number or a fraction such as 8/255 but got {value}.")


# Only the command line needs it: modules and callbacks work on a machine that lacks it.
if find_spec("jsonargparse"):
    from jsonargparse.typing import register_type

    register_type(
        Eps,
        serializer=float,
        deserializer=read_number,
        # Values stay plain floats: an Eps object in a checkpoint could not be loaded safely.
        type_check=lambda value, _: type(value) is float,
    )
