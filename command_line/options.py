"""Options of a command line, before any parser sees them."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One option as it was typed.

    Attributes:
        name: Without dashes, such as `model.eps`.
        value: What it is set to; None for a switch.
        arguments: The one or two arguments that it was typed as.
    """

    name: str
    value: str | None
    arguments: tuple[str, ...]


def read_options(arguments: Sequence[str]) -> list[Option]:
    """Puts options and their values together: `--a b` and `--a=b` are one each.

    Args:
        arguments: As typed, without the subcommand.

    Example:
        >>> [option[:2] for option in read_options(["--a=1", "--b", "-2", "--c"])]
        [('a', '1'), ('b', '-2'), ('c', None)]
    """
    pairs: list[list[str]] = []
    for argument in arguments:
        takes_value = bool(pairs) and len(pairs[-1]) == 1 and "=" not in pairs[-1][0]
        if argument.startswith("-") and not re.match(r"-[\d.]", argument):
            pairs.append([argument])
        elif takes_value and pairs[-1][0].startswith("-"):
            pairs[-1].append(argument)
        else:
            pairs.append([argument])
    return [_option(pair) for pair in pairs]


def _option(pair: Sequence[str]) -> Option:
    name, equals, value = pair[0].partition("=")
    given = value if equals else pair[1] if len(pair) > 1 else None
    return Option(name.lstrip("-"), given, tuple(pair))
