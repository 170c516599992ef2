"""Reads W&B sweep files as W&B's agent does, for runs without an agent."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from robust_flatness.configs.compose import CONFIGS


def sweep_runs(sweep: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The runs of a sweep file of the method `grid`.

    Args:
        sweep: Path of the file, or name of one of the package's, such as `trades`.

    Yields:
        Arguments of `fit` that an agent would give, and what is swept in them as a short text.

    Raises:
        ValueError: If there is no such file, or it is no grid whose command calls `fit`.

    Example:
        >>> [text for _, text in sweep_runs("trades")]
        ['lam1.0', 'lam3.0', 'lam6.0', 'lam9.0']
    """
    file = _find(sweep)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        command = [str(part) for part in content["command"]]
        start, place = command.index("fit") + 1, command.index("${args}")
        axes = [[(name, v) for v in _values(c)] for name, c in content["parameters"].items()]
        grid = content["method"] == "grid" and bool(axes)
    except (AttributeError, KeyError, TypeError, ValueError):
        grid = False
    if not grid:
        raise ValueError(
            "Expected `--sweep` to be a grid of values whose command holds fit and ${args} but got "
            f"{file}."
        )
    for swept in itertools.product(*axes):
        given = (f"--{name}={value}" for name, value in swept)
        arguments = (*command[start:place], *given, *command[place + 1 :])
        yield arguments, "-".join(itertools.chain(*(_shown(*axis) for axis in swept)))


def _find(sweep: str) -> Path:
    folder = CONFIGS / "sweeps"
    name = sweep.removeprefix("configs/sweeps/").removesuffix(".yaml")
    for file in (Path(sweep).expanduser(), folder / f"{name}.yaml"):
        if file.is_file():
            return file
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"Expected `--sweep` to be a sweep file or one of {known} but got {sweep}.")


def _values(choice: Mapping[str, Any]) -> list[Any]:
    return list(choice["values"]) if "values" in choice else [choice["value"]]


def _shown(name: str, value: Any) -> list[str]:
    """A swept value for a folder's name; of a mapping, such as a config written out, its leaves."""
    content = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(content, Mapping):
        return [text for inner in content.items() for text in _shown(*inner)]
    # A name is not needed twice: the method stands in front.
    return [] if name == "name" else [f"{name.rsplit('.', 1)[-1]}{value}"]
