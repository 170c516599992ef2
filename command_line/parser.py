"""The command line's parser, which says in one sentence what is wrong."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from robust_flatness.command_line.options import Option, read_options
from robust_flatness.command_line.sentences import one_sentence
from robust_flatness.command_line.suggestions import options_of


class Parser(LightningArgumentParser):
    """Says what is wrong without a hundred lines of usage before it and of attempts behind it.

    Attributes:
        typed: The options as they were typed.
        settings: The configuration that files make.
        known: Lists the options that there are; `None` for those of the parser itself.
    """

    typed: Sequence[Option] = ()
    settings: Mapping[str, Any] | None = None
    known: Callable[[], Iterable[str]] | None = None

    def print_usage(self, file: Any = None) -> None:
        """Prints the usage where it was asked for, and not in front of an error."""
        if file is not sys.stderr:
            super().print_usage(file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with status 2 and one sentence."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            # A parser inside of another one, whose error is a part of the account.
            super().error(message, ex)
        known = self.known or self.get_defaults().keys
        self.refuse(one_sentence(message, self.typed, known, self.settings))

    def refuse(self, sentence: str) -> NoReturn:
        """Ends with status 2.

        Args:
            sentence: What is wrong.
        """
        self.exit(2, f"error: {sentence}\n")
        raise SystemExit(2)


@contextmanager
def refusing(parser: Any, arguments: Sequence[str] | None = None) -> Iterator[None]:
    """Ends in one sentence of the parser whatever is wrong with its arguments.

    Args:
        parser: The parser.
        arguments: As typed, without the subcommand; `None` if the parser knows them.
    """
    if arguments is not None:
        parser.typed = read_options(arguments)
    try:
        yield
    except Exception as error:
        parser.error(told(error))


def told(error: Exception) -> str:
    """What an exception says, with its type and line if it was not raised for the user to read.

    Example:
        >>> told(RecursionError("too deep")), told(ValueError("Expected a b but got c."))
        ('RecursionError: too deep.', 'Expected a b but got c.')
    """
    cause: BaseException = error
    while "Does not validate" in str(cause) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, (ValueError, OSError, MisconfigurationException)):
        return str(error)
    frames = extract_tb(cause.__traceback__)
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(cause).__name__}: {cause}".rstrip(". ") + f"{line}."


def set_known(parser: Any, subparser: Any, settings: Mapping[str, Any]) -> None:
    """Tells parsers the options that there are for the chosen classes, as suggestions.

    Args:
        parser: The outer parser, which knows the typed options.
        subparser: The subcommand's parser.
        settings: The configuration, with the class paths of model and data.
    """

    def known() -> list[str]:
        names = list(subparser.get_defaults().keys())
        for key in ("model", "data"):
            names += [f"{key}.{name}" for name in options_of(settings[key]["class_path"])]
        return names

    parser.known = subparser.known = known
    parser.settings = subparser.settings = settings
    subparser.typed = parser.typed
