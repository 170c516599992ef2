"""Config files: the package's and the user's, read with limits, and the settings of checkpoints."""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from robust_flatness.command_line.parser import Option
from robust_flatness.lightning_modules.checkpoints import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"
# A run's own config.yaml has about 400 values.
_MOST_VALUES = 4000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Settings = dict[str, Any]


class _UniqueKeys(_Loader):
    """Refuses a key that comes twice, of which YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1 and key != "<<":
                problem = f"`{key}` comes twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_mapping(source: str, option: str = "--config", text: str | None = None) -> Settings:
    """Reads options from the YAML file `source`, which `option` named, or from typed `text`.

    Raises:
        ValueError: If it cannot be read, is not YAML, is too large, or holds no options.
    """
    start = f"Expected `{option}` to be"
    try:
        text = Path(source).read_text(encoding="utf-8") if text is None else text
        content = yaml.load(text, Loader=_UniqueKeys) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{start} a text file but got {source}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{start} YAML but got {source}: {problem}{line}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"Expected `{option}` to hold a mapping but got {kind} in {source}.")
    parts, seen = [content], 0
    while parts:
        part, seen = parts.pop(), seen + 1
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        # Aliases may stand for any number of values, also for themselves.
        if seen > _MOST_VALUES:
            raise ValueError(
                f"{start} of at most {_MOST_VALUES} values, aliases included, but got {source}."
            )
    for key in content:
        if not isinstance(key, str) or key == "config":
            raise ValueError(f"Expected `{option}` to hold options but got `{key}` in {source}.")
    return content


def read_config(source: str) -> tuple[Settings, Path | None]:
    """Reads what `--config` takes: a file, one of the package's by its name, or typed YAML.

    Returns the settings, and the file.
    """
    if source.lstrip().startswith("{"):
        return read_mapping(source, text=source), None
    name = source.removeprefix("configs/")
    for file in (Path(source).expanduser(), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if "\0" not in source and file.is_file():
            return read_mapping(str(file)), file
    rows = sorted(f"table1/{path.name}" for path in (CONFIGS / "table1").glob("*.yaml"))
    near = get_close_matches(name, rows, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(rows)}."
    raise ValueError(
        f"Expected `--config` to be a YAML file but got {source or 'nothing'}; {known}"
    )


def is_preset(file: Path | None) -> TypeGuard[Path]:
    """Whether a file is in `configs/`."""
    return file is not None and file.resolve().is_relative_to(CONFIGS.resolve())


def read_preset(*parts: str) -> Settings:
    """Reads a file of `configs/`; empty if there is none."""
    file = CONFIGS.joinpath(*parts)
    return read_mapping(str(file)) if file.is_file() else {}


def snake_case(class_path: str) -> str:
    """A class name as files are called by it, such as `image_folder`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", class_path.rsplit(".", 1)[-1]).lower()


def with_overlays(
    settings: Settings, file: Path | None, data: str, known: Sequence[str], earlier: Sequence[str]
) -> list[Settings]:
    """The settings of a file on one data set: its own, those `on_data`, those of its overlays.

    Only presets of the package have overlays: `configs/<data>/<name>.yaml`, and
    `configs/<earlier>/<name>.yaml`. `known` are the names of the package's classes of data,
    `earlier` those of the presets before this file.
    """
    sections, short = settings.pop("on_data", {}), data.rsplit(".", 1)[-1]
    mappings = sections.items() if isinstance(sections, dict) else [(None, None)]
    for name, section in mappings:
        # A class path may be one of the user's own.
        if not isinstance(section, dict) or (name not in known and "." not in str(name)):
            raise ValueError(
                f"Expected `on_data` to hold mappings by {', '.join(sorted(known))}, or class "
                f"paths, but got {sections}."
            )
    layers = [settings, sections.get(short, sections.get(data, {}))]
    if is_preset(file):
        layers += [read_preset(folder, file.name) for folder in (snake_case(data), *earlier)]
    return layers


def run_folder_of(checkpoint: str | None) -> Path | None:
    """The run folder of `<run folder>/checkpoints/<name>.ckpt`, if it is in one."""
    if not checkpoint:
        return None
    folder = Path(checkpoint.replace("\0", "")).expanduser().resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def settings_of_run(folder: Path) -> Settings:
    """The settings of a run, without the checkpoint that it went on from."""
    file = str(folder / "config.yaml")
    settings = read_mapping(file, "--ckpt_path")
    for key in ("model", "data"):
        part = settings.get(key)
        if not isinstance(part, dict) or not isinstance(part.get("class_path"), str):
            raise ValueError(
                f"Expected `--ckpt_path` to lie in a run folder whose config.yaml holds the class "
                f"of `{key}` but got {part} in {file}."
            )
    settings.pop("ckpt_path", None)
    return settings


def settings_of_checkpoint(typed: Sequence[Option], files: Sequence[Settings]) -> Settings:
    """The settings of the run that a checkpoint lies in, else its model's; empty without one."""
    paths = [file["ckpt_path"] for file in files if file.get("ckpt_path")]
    paths += [option.value for option in typed if option.name == "ckpt_path"]
    path = str(paths[-1] or "") if paths else ""
    folder = run_folder_of(path)
    if folder is not None:
        return settings_of_run(folder)
    if not Path(path).is_file():
        return {}
    saved = read_checkpoint(path, "--ckpt_path").get("hyper_parameters")
    if not isinstance(saved, dict) or not saved:
        return {}
    arguments = {k: v for k, v in saved.items() if k not in ("_class_path", "_instantiator")}
    named = {"class_path": saved["_class_path"]} if "_class_path" in saved else {}
    return {"model": {**named, "init_args": arguments}}
