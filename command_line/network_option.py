"""The choice of a network, which may be one of the user's own."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from robust_flatness.command_line.options import Option
from robust_flatness.networks.user_network import (
    UserNetwork,
    check_buildable,
    import_path,
)

OPTION = "model.network"
USER_NETWORK = f"robust_flatness.networks.{UserNetwork.__name__}"


def typed_network(options: Sequence[Option], names: Mapping[str, str]) -> str | None:
    """The class path of the network that was typed, if one was.

    Args:
        options: As typed.
        names: Class paths of networks by short name.
    """
    typed = [o.value for o in options if _inner(o.name) in ("", "class_path") and o.value]
    return names.get(typed[-1], typed[-1]) if typed else None


def drop_other_networks(layer: Mapping[str, Any], path: str, names: Mapping[str, str]) -> None:
    """Drops a network of another class, and its arguments, from a file's settings.

    Arguments without a class, such as `activation`, are for any network and stay.

    Args:
        layer: The content of a file, changed in place.
        path: Class path of the network that was typed.
        names: Class paths of networks by short name.
    """
    sections = layer.get("on_data")
    for part in (layer, *(sections.values() if isinstance(sections, dict) else ())):
        model = part.get("model") if isinstance(part, dict) else None
        settings = model.get("init_args") if isinstance(model, dict) else None
        if isinstance(settings, dict):
            written, _ = _written(settings.get("network"), names)
            if written not in (None, path):
                del settings["network"]


def place_network(
    settings: dict[str, Any],
    options: Sequence[Option],
    names: Mapping[str, str],
    *,
    external: bool,
) -> list[Option]:
    """Writes a chosen network into the settings of the model.

    A network that is not this package's is written down as a `UserNetwork`.

    Args:
        settings: Arguments of the model out of all files, changed in place.
        options: As typed.
        names: Class paths of networks by short name.
        external: Whether the model takes names of other packages' networks as well.

    Returns:
        The options that are left to the parser.

    Raises:
        ValueError: If there is nothing of the chosen path, or if it is no network.
    """
    typed = [(_inner(option.name), option) for option in options]
    chosen = typed_network(options, names)
    before, arguments = _written(settings.get("network"), names)
    path = chosen or before
    is_path = path is not None and all(part.isidentifier() for part in path.split("."))
    if chosen and not is_path and not external and not chosen.startswith("{"):
        raise ValueError(
            f"Expected `--{OPTION}` to be a class path such as package.Class but got {chosen}."
        )
    if path is None or not is_path or "." not in path:
        # Names of other packages, or a mapping that the parser reads.
        return list(options)
    network = import_path(path)
    check_buildable(network, path)
    if path.startswith("robust_flatness."):
        # The parser hands the arguments of a default class on to the class that replaces it.
        settings["network"] = {"class_path": path, "init_args": {**_defaults(network), **arguments}}
        # Short names are not for the parser, which knows classes of other packages as well.
        return [option for name, option in typed if name not in ("", "class_path")]
    for name, option in typed:
        if name not in (None, "", "class_path"):
            _set(arguments, name.removeprefix("init_args."), option.value)
    inner = {"path": path, "arguments": arguments}
    settings["network"] = {"class_path": USER_NETWORK, "init_args": inner}
    return [option for name, option in typed if name is None]


def _inner(name: str) -> str | None:
    """What an option says of the network: "" for its class, else the name of its argument."""
    name = name.replace("model.init_args.", "model.", 1)
    if name == OPTION:
        return ""
    return name.removeprefix(f"{OPTION}.") if name.startswith(f"{OPTION}.") else None


def _written(network: Any, names: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """Class path and arguments of a network in a file, without the `UserNetwork` around it."""
    if isinstance(network, str):
        return names.get(network, network), {}
    if not isinstance(network, Mapping):
        return None, {}
    path, arguments = network.get("class_path"), network.get("init_args") or {}
    if path == USER_NETWORK:
        path, arguments = arguments.get("path"), arguments.get("arguments") or {}
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    return (names.get(path, path) if isinstance(path, str) else None), arguments


def _defaults(network: Any) -> dict[str, Any]:
    """Defaults of the arguments that a network of this package has of its own."""
    parameters = inspect.signature(network).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    return {p.name: p.default for p in own}


def _set(arguments: dict[str, Any], name: str, value: str | None) -> None:
    *outer, last = name.split(".")
    for key in outer:
        arguments = arguments.setdefault(key, {})
    try:
        arguments[last] = yaml.safe_load(value or "")
    except yaml.YAMLError:
        arguments[last] = value
