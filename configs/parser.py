"""The command line's parser, which says in one sentence what is wrong."""

import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class Parser(LightningArgumentParser):
    """Says what is wrong without a hundred lines of usage before it and of attempts behind it."""

    def print_usage(self, file: Any = None) -> None:
        """Prints the usage where it was asked for, and not in front of an error."""
        if file is not sys.stderr:
            super().print_usage(file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says it in one sentence where there is one."""
        super().error(one_sentence(message), ex)


def one_sentence(message: str) -> str:
    r"""The sentence that tells what is wrong, out of an account of all that a parser tried.

    Args:
        message: The parser's message.

    Returns:
        A sentence of this package, or about an argument that a class does not take; else the
        message.

    Example:
        >>> one_sentence("Errors:\n  - Expected `w_max` to be > 0 but got -1.\n  - Expected a None")
        'Expected `w_max` to be > 0 but got -1.'
        >>> one_sentence("class_path 'pkg.AT':\n  Option 'lam' is not accepted\nGiven value")
        'Expected arguments that AT takes but got `lam`.'
        >>> one_sentence("Parser key 'model':\n  - Option 'epss' is not accepted")
        'Expected `epss` to be an argument of the chosen class but it is none.'
    """
    ours = re.findall(r"^\s*(?:- )?(Expected `.*)$", message, re.MULTILINE)
    if ours:
        return str(ours[-1])
    refused = re.findall(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if refused:
        path, option = refused[-1]
        return f"Expected arguments that {path.rsplit('.', 1)[-1]} takes but got `{option}`."
    unknown = re.findall(r"Option '([^']+)' is not accepted", message)
    # Without the key it is a part of the account, to which the class is still to come.
    if unknown and "Parser key" in message:
        return f"Expected `{unknown[-1]}` to be an argument of the chosen class but it is none."
    return message
