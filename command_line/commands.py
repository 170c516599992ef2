"""Commands that are functions: they take neither model nor data, so LightningCLI has no part."""

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from robust_flatness.command_line.parser import Parser, refusing


def run_command(function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Calls a function with arguments of the command line, with the manners of `fit`.

    Args:
        function: With types and a docstring, which is its `--help`.
        arguments: As typed, beginning with the command's name. What follows `--` is the function's
            `options`.
    """
    name, given, options = arguments[0], list(arguments[1:]), None
    if "--" in given:
        split = given.index("--")
        given, options = given[:split], given[split + 1 :]
    parser = Parser(
        prog=f"cli.py {name}",
        allow_abbrev=False,
        description=(function.__doc__ or "").split("\n\n")[0],
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    # A switch may stand alone, as everywhere.
    switches = [f"--{key}" for key, kind in get_type_hints(function).items() if kind is bool]
    following = [*given[1:], ""]
    given = [
        f"{typed}=true" if typed in switches and after not in ("true", "false") else typed
        for typed, after in zip(given, following)
    ]
    with refusing(parser, arguments[1:]):
        parsed = parser.parse_args(given)
    if options is not None:
        parsed["options"] = options
    try:
        function(**parsed.as_dict())
    except (ValueError, OSError) as error:
        parser.error(str(error))
