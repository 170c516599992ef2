"""Options: as they are typed, as files hold them, and as classes take them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser


class Option(NamedTuple):
    """One option, without dashes and `init_args`, such as `model.eps`; a switch has no value."""

    name: str
    value: str | None
    arguments: tuple[str, ...] = ()


def read_options(arguments: Sequence[str]) -> list[Option]:
    """Puts options and their values together: `--a b` and `--a=b` are one each.

    Example:
        >>> [option[:2] for option in read_options(["--a=1", "--b", "-2", "--c"])]
        [('a', '1'), ('b', '-2'), ('c', None)]
    """
    pairs: list[list[str]] = []
    for argument in arguments:
        is_name = argument.startswith("-") and not re.match(r"-[\d.]", argument)
        if not is_name and pairs and len(pairs[-1]) == 1 and re.match("-[^=]*$", pairs[-1][0]):
            pairs[-1].append(argument)
        else:
            pairs.append([argument])
    options = []
    for pair in pairs:
        name, equals, value = pair[0].partition("=")
        name = name.lstrip("-").replace(".init_args", "")
        options.append(Option(name, value if equals else (*pair, None)[1], tuple(pair)))
    return options


def leaves(part: Any, name: str = "") -> Iterator[Option]:
    """The values of a mapping as options.

    Example:
        >>> [o[:2] for o in leaves({"model": {"class_path": "AT", "init_args": {"eps": 0.1}}})]
        [('model', 'AT'), ('model.eps', '0.1')]
    """
    if isinstance(part, list) and any(isinstance(item, Mapping) for item in part):
        for item in part:
            yield from leaves(item, name)
    elif isinstance(part, Mapping):
        for key, value in part.items():
            inner = key not in ("init_args", "class_path")
            yield from leaves(value, f"{name}.{key}".lstrip(".") if inner else name)
    else:
        yield Option(name, str(part))


@cache
def options_of(class_path: str) -> dict[str, Any]:
    """The options that a class takes, with their defaults; empty if it is no class.

    Example:
        >>> options_of("lightning.pytorch.callbacks.LearningRateMonitor")["log_momentum"]
        False
    """
    parser = ArgumentParser()
    try:
        parser.add_class_arguments(resolve_name(class_path), fail_untyped=False)
    except Exception:
        # The class is at fault, which the parser says.
        return {}
    options = parser.get_defaults().items()
    return {k.replace("init_args.", "").removesuffix(".class_path"): v for k, v in options}


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that suggests known options near a misspelt one.

    Example:
        >>> nearest("trainer.maxepochs", ["trainer.max_epochs", "trainer.devices", "name"])
        '; did you mean `--trainer.max_epochs`?'
        >>> nearest("trainer.foo", ["trainer.max_epochs"])
        '.'
    """
    name, end = name.lower().replace("-", "_"), name.lower().rsplit(".", 1)[-1]
    # A long beginning that is right does not make the ends alike.
    ends = get_close_matches(end, {known.rsplit(".", 1)[-1] for known in names}, cutoff=0.6)
    alike = [known for known in names if known.rsplit(".", 1)[-1] in ends]
    close = get_close_matches(name, alike, n=2, cutoff=0.6)
    return f"; did you mean `--{'` or `--'.join(close)}`?" if close else "."
