"""One configuration out of presets, a run's own, the user's files and the command line.

Later ones win: the preset of the chosen data, the `config.yaml` of a checkpoint's run, the user's
`--config` files in order, the command line. A default class is named only where nobody chose one,
and before anything else, because jsonargparse hands the arguments of a default class on to the
class that replaces it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent
DEFAULTS = CONFIGS / "defaults.yaml"
DEFAULT_CLASSES = {"model": "AT", "data": "Digits"}


def compose(arguments: Sequence[str], known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Rewrites the arguments of a subcommand so that their order does not matter.

    Args:
        arguments: As typed, beginning with the subcommand.
        known: Full class path by short name, for `model` and `data`, and for other options that
            take a class.

    Returns:
        Arguments with one `--config` that holds everything but the typed options, and these after
        it, outer ones before inner ones.

    Raises:
        ValueError: If a class name or a file is unknown, or the checkpoint of another model.

    Example:
        >>> known = {"model": {"AT": "pkg.AT"}, "data": {"Digits": "pkg.Digits"}}
        >>> compose(["fit", "--model.network.width=8", "--model.eps=0.1"], known)[3:]
        ['--model.eps=0.1', '--model.network.width=8']
    """
    subcommand, options = arguments[0], _pairs(arguments[1:])
    for option in options:
        _check_name(option, known)
    files = [_read(_value(option)) for option in options if _name(option) in ("config", "c")]
    run = _run_config(options)
    classes = {
        key: _chosen(key, options, [*files[::-1], run], known[key]) for key in DEFAULT_CLASSES
    }
    if run and classes["model"] != run["model"]["class_path"]:
        raise ValueError(
            f"Expected `--model` to be {_short(run['model']['class_path'])}, which wrote the "
            f"checkpoint, but got {_short(classes['model'])}."
        )
    preset = CONFIGS / "data" / f"{_snake(classes['data'])}.yaml"
    layers = [_read(str(preset)) if preset.is_file() else {}, run, *files]
    merged: dict[str, Any] = {}
    for layer in layers:
        for key in DEFAULT_CLASSES:
            if isinstance(layer.get(key), str):
                layer[key] = {"class_path": layer[key]}
        merged = _merge(merged, layer)
    for key, name in classes.items():
        merged[key] = {**merged.get(key, {}), "class_path": name}
    kept = [option for option in options if _name(option) not in ("config", "c", *DEFAULT_CLASSES)]
    typed = [argument for option in sorted(kept, key=_depth) for argument in option]
    return [subcommand, "--config", yaml.safe_dump(merged), *typed]


def run_folder_of(checkpoint: str | None) -> Path | None:
    """The run folder that a checkpoint lies in, if it lies in one.

    Args:
        checkpoint: Path of a checkpoint, `<run folder>/checkpoints/<name>.ckpt`.
    """
    if not checkpoint:
        return None
    folder = Path(checkpoint).expanduser().resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def _pairs(arguments: Sequence[str]) -> list[list[str]]:
    """Options with their values: `--a b` and `--a=b` are one piece each."""
    pairs: list[list[str]] = []
    for argument in arguments:
        takes_value = bool(pairs) and len(pairs[-1]) == 1 and "=" not in pairs[-1][0]
        if argument.startswith("-") and not re.match(r"-[\d.]", argument):
            pairs.append([argument])
        elif takes_value and pairs[-1][0].startswith("-"):
            pairs[-1].append(argument)
        else:
            pairs.append([argument])
    return pairs


def _name(option: Sequence[str]) -> str:
    return option[0].split("=")[0].lstrip("-")


def _value(option: Sequence[str]) -> str:
    return option[0].split("=", 1)[1] if "=" in option[0] else option[-1]


def _depth(option: Sequence[str]) -> int:
    """Sorts inner arguments of model and data behind the classes that own them."""
    name = _name(option)
    return name.count(".") if name.split(".")[0] in DEFAULT_CLASSES else 99


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"Expected `--config` to be a YAML file but got {path}.")
    content = yaml.safe_load(file.read_text()) or {}
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold a mapping but got {type(content).__name__}.")
    return content


def _run_config(options: Sequence[Sequence[str]]) -> dict[str, Any]:
    checkpoints = [_value(option) for option in options if _name(option) == "ckpt_path"]
    folder = run_folder_of(checkpoints[-1] if checkpoints else None)
    config = _read(str(folder / "config.yaml")) if folder else {}
    config.pop("ckpt_path", None)
    return config


def _chosen(
    key: str,
    options: Sequence[Sequence[str]],
    files: Sequence[Mapping[str, Any]],
    known: Mapping[str, str],
) -> str:
    """The class path of model or data: typed, else from the last file that names one."""
    names = [_value(option) for option in options if _name(option) == key][::-1]
    for content in files:
        choice = content.get(key) or {}
        names.append(choice if isinstance(choice, str) else choice.get("class_path") or "")
    name = next(filter(None, names), DEFAULT_CLASSES[key])
    _check_name([f"--{key}={name}"], {key: known})
    return known.get(name, name)


def _check_name(option: Sequence[str], known: Mapping[str, Mapping[str, str]]) -> None:
    names = known.get(_name(option).rstrip("+"))
    if names is None or (len(option) == 1 and "=" not in option[0]):
        return
    name = _value(option)
    # Anything but a bare word is a class path, or YAML that the parser reads.
    if name.isidentifier() and name not in names and name != "null":
        raise ValueError(
            f"Expected `--{_name(option)}` to be one of {', '.join(sorted(names))}, or a class "
            f"path such as package.Class, but got {name}."
        )


def _short(class_path: str) -> str:
    return class_path.rsplit(".", 1)[-1]


def _snake(class_path: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _short(class_path)).lower()


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; lists and values of `above` replace those of `below`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            # A network or optimizer has arguments of its own, so those of the one that it replaces
            # are dropped; variants of a model share theirs.
            replaced = key not in DEFAULT_CLASSES and _other_class(old, value)
            merged[key] = dict(value) if replaced else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_class(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = [_short(str(mapping.get("class_path", ""))) for mapping in (old, new)]
    return "" not in names and names[0] != names[1]
