"""Reads W&B sweep files as W&B's agent does, for runs without an agent."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from robust_flatness.command_line.compose import CONFIGS
from robust_flatness.command_line.files import read_mapping


def sweep_runs(sweep: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The runs of a sweep file of the method `grid`.

    Args:
        sweep: Path of the file, or name of one of the package's, such as `trades`.

    Yields:
        Arguments of `fit` that an agent would give, and what is swept in them as a short text.

    Raises:
        ValueError: If there is no such file, or it is no grid whose command calls `fit`, with what
            is at fault.

    Example:
        >>> [text for _, text in sweep_runs("trades")]
        ['lam1.0', 'lam3.0', 'lam6.0', 'lam9.0']
    """
    file = _find(sweep)
    content = read_mapping(str(file), option="--sweep")
    if content.get("method") != "grid":
        raise ValueError(
            f"Expected `--sweep` to have the method grid but {file} has {content.get('method')}."
        )
    before, behind = _command(content.get("command"), file)
    axes = _axes(content.get("parameters"), file)
    for swept in itertools.product(*axes):
        given = (f"--{name}={value}" for name, value in swept)
        text = "-".join(itertools.chain(*(_shown(*axis) for axis in swept)))
        yield (*before, *given, *behind), text


def _find(sweep: str) -> Path:
    folder = CONFIGS / "sweeps"
    name = sweep.removeprefix("configs/sweeps/").removesuffix(".yaml")
    for file in (Path(sweep).expanduser(), folder / f"{name}.yaml"):
        if file.is_file():
            return file
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"Expected `--sweep` to be a sweep file or one of {known} but got {sweep}.")


def _command(given: Any, file: Path) -> tuple[list[str], list[str]]:
    """Arguments of `fit` before and behind the swept ones."""
    if not isinstance(given, list):
        raise ValueError(
            "Expected `--sweep` to have a list as command that holds fit and ${args} but "
            f"{file} has {'none' if given is None else given}."
        )
    command = [str(part) for part in given]
    for part in ("fit", "${args}"):
        if part not in command:
            raise ValueError(
                f"Expected the command of `--sweep` to hold {part} but that of {file} does not."
            )
    start, place = command.index("fit") + 1, command.index("${args}")
    return command[start:place], command[place + 1 :]


def _axes(given: Any, file: Path) -> list[list[tuple[str, Any]]]:
    """The values of each parameter, with its name."""
    try:
        axes = [[(name, value) for value in _values(choice)] for name, choice in given.items()]
    except (AttributeError, KeyError, TypeError):
        axes = []
    if not axes:
        raise ValueError(
            f"Expected the parameters of `--sweep` to hold `values` or a `value` each but those of "
            f"{file} do not."
        )
    return axes


def _values(choice: Mapping[str, Any]) -> list[Any]:
    return list(choice["values"]) if "values" in choice else [choice["value"]]


def _shown(name: str, value: Any) -> list[str]:
    """A swept value for a folder's name; of a mapping, such as a config written out, its leaves."""
    content = value
    if isinstance(value, str):
        # Text that is not YAML is refused by the option that takes it.
        with suppress(yaml.YAMLError):
            content = yaml.safe_load(value)
    if isinstance(content, Mapping):
        return [text for inner in content.items() for text in _shown(*inner)]
    # A name is not needed twice: the method stands in front.
    return [] if name == "name" else [f"{name.rsplit('.', 1)[-1]}{value}"]
