"""The YAML files of the command line: read with limits, and checked for what no run can use."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# A run's own config.yaml has about 400 values in 6 levels.
_MOST_VALUES, _MOST_LEVELS = 2000, 50
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Unique(_Loader):
    """Refuses a key that comes twice, of which YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        doubled = [key for key, count in keys.items() if key != "<<" and count > 1]
        if doubled:
            raise yaml.MarkedYAMLError(
                problem=f"`{doubled[0]}` comes twice", problem_mark=node.start_mark
            )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_mapping(given: str, text: str | None = None, option: str = "--config") -> dict[str, Any]:
    """A YAML file, or YAML written out, that holds a mapping.

    Args:
        given: Path of the file, or how the text was given, for messages.
        text: The text; `None` reads it from the file.
        option: The option that names it.

    Raises:
        ValueError: If it cannot be read, is not YAML, or no mapping with text as keys.
    """
    try:
        text = Path(given).read_text(encoding="utf-8") if text is None else text
        _check_size(text)
        content = yaml.load(text, Loader=_Unique) or {}
        _check_aliases(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected `{option}` to be a text file but got {given}.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(
            f"Expected `{option}` to be YAML but got {given}: {error.problem}{line}."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected `{option}` to be YAML but got {given}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected `{option}` to hold a mapping but got {type(content).__name__} in {given}."
        )
    return content


def check_layer(content: Mapping[Any, Any], given: str) -> None:
    """Refuses a file whose outer parts no run can use.

    Args:
        content: Of the file.
        given: The file, for messages.

    Raises:
        ValueError: If a part has the wrong type.
    """
    for key in content:
        if not isinstance(key, str):
            raise ValueError(f"Expected options as keys of {given} but got `{key}`.")
    if "config" in content:
        raise ValueError(
            f"Expected `--config` several times in place of `config` inside {given} but got "
            f"{content['config']}."
        )
    if "trainer" in content and not isinstance(content["trainer"], dict):
        raise ValueError(
            f"Expected `trainer` in {given} to be a mapping but got {content['trainer']}."
        )
    for key in ("model", "data"):
        part = content.get(key, "")
        if not isinstance(part, (str, dict)):
            raise ValueError(
                f"Expected `{key}` in {given} to be a class or a mapping but got {part}."
            )
        if isinstance(part, str):
            continue
        others = sorted(part.keys() - {"class_path", "init_args", "dict_kwargs"}, key=str)
        if others:
            raise ValueError(
                f"Expected `{key}` in {given} to hold class_path and init_args, and arguments "
                f"inside init_args, but got `{key}.{others[0]}`."
            )
        if not isinstance(part.get("class_path", ""), str):
            raise ValueError(
                f"Expected `{key}.class_path` in {given} to be text but got {part['class_path']}."
            )
        if not isinstance(part.get("init_args", {}), dict):
            raise ValueError(
                f"Expected `{key}.init_args` in {given} to be a mapping but got "
                f"{part['init_args']}."
            )


def _check_size(text: str) -> None:
    """Reads the text's events alone, which takes neither recursion nor memory."""
    level = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.ScalarEvent)
        if level > _MOST_LEVELS:
            raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep.")
        if values > 2 * _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES} values.")


def _check_aliases(content: Any) -> None:
    """Counts what aliases stand for, which may be endless."""
    parts, seen = [content], 0
    while parts:
        part, seen = parts.pop(), seen + 1
        if isinstance(part, (dict, list)):
            parts += part.values() if isinstance(part, dict) else part
        if seen > 2 * _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values.")
