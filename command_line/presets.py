"""Presets, files and checkpoints as `--config` arguments in front of the typed options.

Later ones win: `configs/defaults.yaml`, the preset of the data, the `config.yaml` of a checkpoint's
run, the user's `--config` files in order, the typed options. jsonargparse merges them. Before it
reads them, this module does what it cannot do:

- The classes of model and data are named once, in front. If a class changed on the way,
  jsonargparse would drop the arguments that only the earlier class has without a word.
- A network takes no arguments of the network that it replaces. jsonargparse would keep those that
  both have, such as the width.
- `eps` and `norm` set the threat model of training and of all measures, and `epochs_share`
  multiplies the epochs of the layers below.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import Any, get_args

import yaml

from robust_flatness.command_line.components import (
    DEFAULT_CALLBACKS,
    OPTIONAL_CALLBACKS,
    known_classes,
)
from robust_flatness.command_line.files import (
    Settings,
    is_preset,
    read_config,
    read_mapping,
    read_preset,
    settings_of_checkpoint,
    snake_case,
    with_overlays,
)
from robust_flatness.command_line.parser import Option, leaves, options_of, read_options
from robust_flatness.functional.checks import check_choice, read_number
from robust_flatness.functional.noise import Norm
from robust_flatness.networks.user_network import UserNetwork, check_buildable, import_path

# These are named if nobody chooses a class.
DEFAULT_CLASSES = {"model": "AT", "data": "Digits"}
# Networks that were trained elsewhere: what a preset says of training is not for them.
EXTERNAL = "External"


@dataclass
class Presets:
    """What the parser reads.

    Attributes:
        classes: Class paths of `model` and `data`.
        layers: Contents of the files, later ones on top.
        typed: Typed options that are left to the parser, outer ones first.
        threat_model: `eps` and `norm`, if a file or an option sets them.
    """

    classes: dict[str, str]
    layers: list[Settings]
    typed: list[Option]
    threat_model: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Arguments of the parser, without the subcommand."""
        files = [part for x in self.layers if x for part in ("--config", yaml.safe_dump(x))]
        return [*files, *(part for option in self.typed for part in option.arguments)]

    @property
    def merged(self) -> Settings:
        """All layers in one mapping."""
        return reduce(_merged, self.layers)


def _merged(below: Settings, above: Settings) -> Settings:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        both = below[key], above[key]
        if all(isinstance(part, dict) for part in both):
            # Another optimizer or schedule has arguments of its own.
            classes = {part["class_path"] for part in both if "class_path" in part}
            merged[key] = _merged(*both) if len(classes) < 2 else above[key]
    return merged


def merge_presets(arguments: Sequence[str]) -> Presets:
    """Puts presets and files in front of the typed options, whose order then does not matter.

    Args:
        arguments: As typed, without the subcommand.

    Raises:
        ValueError: If a class name or a file is unknown, or the checkpoint is of another model.

    Example:
        >>> merge_presets(["--model.network.width=8", "--model.eps=0.1"]).arguments[-2:]
        ['--model.eps=0.1', '--model.network.width=8']
    """
    typed, known = read_options(arguments), known_classes()
    files = [read_config(option.value or "") for option in typed if option.name in ("config", "c")]
    run = settings_of_checkpoint(typed, [settings for settings, _ in files])
    goes_on = "data" in run
    below = [*(settings for settings, _ in files[::-1]), run]
    classes = {key: _class_path(key, typed, below) for key in DEFAULT_CLASSES}
    model, data = classes.values()
    wrote = run.get("model", {}).get("class_path", model)
    if model != wrote:
        raise ValueError(
            f"Expected `--model` to be {wrote.rsplit('.', 1)[-1]}, which wrote the checkpoint, but "
            f"got {model.rsplit('.', 1)[-1]}."
        )
    own, external = model in known["model"].values(), model.endswith(f".{EXTERNAL}")
    for option in typed:
        if re.search(r"\s", option.name):
            raise ValueError(f"Expected an option without spaces but got `--{option.name}`.")
        # Networks of others have names of their own.
        if not external or option.name == "data":
            _check_name(option.name, option.value)
    preset = read_preset("data", f"{snake_case(data)}.yaml")
    if "model" in preset and (external or not own):
        # A class that is not derived from AT may not take what the preset sets.
        settings = preset["model"]["init_args"].items()
        taken = () if external else options_of(model)
        preset["model"] = {"init_args": {k: v for k, v in settings if k in taken}}
    user: list[Settings] = []
    earlier: list[str] = []
    for settings, file in files:
        user += with_overlays(settings, file, data, list(known["data"]), earlier)
        if is_preset(file):
            earlier.append(file.stem)
    shares = [option.value for option in typed if option.name == "epochs_share"]
    if shares and goes_on:
        raise ValueError(
            "Expected no `--epochs_share` for a run that goes on, whose length is known, but got "
            f"{shares[-1]}."
        )
    user += [read_mapping("", text=f"epochs_share: {share}") for share in shares[-1:]]
    layers = [read_preset("defaults.yaml"), preset, run, *user]
    for layer, key in product(layers, DEFAULT_CLASSES):
        if isinstance(layer.get(key), str):
            del layer[key]
        elif key in layer:
            layer[key].pop("class_path", None)
            inner = layer[key].get("init_args", {})
            if not isinstance(inner, dict):
                raise ValueError(f"Expected `--{key}.init_args` to be a mapping but got {inner}.")
    named = {key: {"class_path": path} for key, path in classes.items()}
    presets = Presets(classes, [named, *layers], typed)
    _set_epochs(layers, goes_on=goes_on)
    for name in ("eps", "norm"):
        _set_threat_model(name, presets, preset, run, user)
    consumed = ("config", "c", "epochs_share", *DEFAULT_CLASSES)
    presets.typed = [option for option in typed if option.name not in consumed]
    if own:
        _place_network(presets, external=external)
    # Inner arguments of model and data come behind the classes that own them.
    presets.typed.sort(
        key=lambda o: o.name.count(".") if o.name.split(".")[0] in DEFAULT_CLASSES else 99
    )
    return presets


def _class_path(key: str, typed: Sequence[Option], files: Sequence[Settings]) -> str:
    """The class path of model or data: typed, else of the first of some files that names one."""
    names: list[Any] = [option.value or "" for option in typed if option.name == key][::-1]
    if not all(re.fullmatch(r"[\w.]+", name) and name != "null" for name in names):
        raise ValueError(
            f"Expected `--{key}` to be a class, or a class path such as package.Class, but got "
            f"{names[0] or 'nothing'}."
        )
    for settings in files:
        part = settings.get(key, "")
        names.append(part.get("class_path", "") if isinstance(part, dict) else part)
        if not isinstance(names[-1], str):
            raise ValueError(f"Expected `--{key}` to be a class or a mapping but got {names[-1]}.")
    name = next(filter(None, names), DEFAULT_CLASSES[key])
    _check_name(key, name)
    return known_classes()[key].get(name, name)


def _check_name(option: str, name: str | None) -> None:
    names = known_classes().get(option.rstrip("+"))
    # Anything but a bare word is a class path, or YAML that the parser reads.
    if names and name and name.isidentifier() and name not in names and name != "null":
        raise ValueError(
            f"Expected `--{option}` to be one of {', '.join(sorted(names))}, or a class path such "
            f"as package.Class, but got {name}."
        )


def _set_epochs(layers: Sequence[Settings], *, goes_on: bool) -> None:
    """Replaces each `epochs_share` by the epochs of the layers below, times the share."""
    epochs: Any = None
    for layer in layers:
        trainer = layer.get("trainer") or {}
        epochs = trainer.get("max_epochs", epochs) if isinstance(trainer, dict) else epochs
        share = layer.pop("epochs_share", None)
        if share is None:
            continue
        if not isinstance(share, (int, float)) or not 0 < share < math.inf:
            raise ValueError(f"Expected `--epochs_share` to be a number > 0 but got {share}.")
        if not isinstance(epochs, int):
            raise ValueError(
                "Expected `--trainer.max_epochs` to be an integer beside `--epochs_share` but got "
                f"{epochs}."
            )
        # A run that goes on has its share already.
        if not goes_on:
            epochs = max(1, round(epochs * share))
            layer["trainer"] = {**trainer, "max_epochs": epochs}


def _set_threat_model(
    name: str, presets: Presets, preset: Settings, run: Settings, user: Sequence[Settings]
) -> None:
    """Adds a layer with `eps` or `norm` at all places that no file sets more specifically."""
    in_files = [leaf for layer in user for leaf in leaves(layer)]
    in_run = [leaf for leaf in leaves(run) if leaf.value != "None"]
    values = [option.value for option in (*in_files, *presets.typed) if option.name == name]
    values = [value for value in values if value not in ("None", "null")]
    default, recorded = preset.pop(name, None), str(run.get(name))
    if not values and (default is None or "data" in run):
        return
    value: Any = values[-1] if values else default
    if name == "norm":
        check_choice("--norm", value, get_args(Norm))
    else:
        try:
            value = read_number(value)
        except ValueError as error:
            said = str(error).replace("Expected", "Expected `--eps` to be", 1)
            raise ValueError(said) from error
    specific = {leaf.name for leaf in in_files}
    if not values or recorded != "None":
        # What equals the run's own threat model was set by it.
        specific |= {leaf.name for leaf in in_run if not values or leaf.value != recorded}
    takers = {k: path for k, path in presets.classes.items() if name in options_of(path)}
    if name == "norm" or "data" not in takers:
        # Measures without `eps` take that of the data.
        active = {o.name.split(".")[0] for o in (*in_files, *in_run, *presets.typed)}
        measures = {k: c for k, c in OPTIONAL_CALLBACKS.items() if k in active} | DEFAULT_CALLBACKS
        paths = {k: f"{c.__module__}.{c.__name__}" for k, c in measures.items()}
        takers |= {k: path for k, path in paths.items() if name in options_of(path)}
    presets.threat_model[name] = value
    layer: Settings = {name: value}
    for key, path in takers.items():
        # Without a run below, a default need not be repeated.
        is_default = not run and options_of(path)[name] == value
        if f"{key}.{name}" not in specific and not is_default:
            layer[key] = {"init_args": {name: value}} if key in DEFAULT_CLASSES else {name: value}
    presets.layers.append(layer)


def _place_network(presets: Presets, *, external: bool) -> None:
    """Collects the network and its arguments from all layers into the first one.

    A network that is not this package's is written down as a `UserNetwork`.
    """
    names, option = known_classes()["model.network"], "model.network"
    of_class = (option, f"{option}.class_path")
    typed = [o.value for o in presets.typed if o.name in of_class]
    settings = [layer.get("model", {}).get("init_args", {}) for layer in presets.layers]
    sections = [(x, *_network_in_file(x["network"])) for x in settings if "network" in x]
    paths = [path for path in (*(path for _, path, _ in sections), *typed[-1:]) if path]
    path = names.get(paths[-1], paths[-1]) if paths else ""
    is_path = all(part.isidentifier() for part in path.split("."))
    if any(typed) and not (is_path or external or path.startswith("{")):
        raise ValueError(
            f"Expected `--{option}` to be a class path such as package.Class but got {path}."
        )
    if not is_path or "." not in path:
        # Arguments of the default network, names of other packages, or what the parser refuses.
        return
    network = import_path(path)
    check_buildable(network, path)
    arguments: dict[str, Any] = {}
    for inner, written, in_file in sections:
        del inner["network"]
        if names.get(str(written), written) in (None, path):
            arguments |= in_file
    presets.typed = [o for o in presets.typed if o.name not in of_class]
    if path.startswith("robust_flatness."):
        parameters = inspect.signature(network).parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
        section = {"class_path": path, "init_args": {p.name: p.default for p in own} | arguments}
    else:
        for name, value, _ in presets.typed:
            if name.startswith(f"{option}."):
                *outer, last = name.removeprefix(f"{option}.").split(".")
                place = reduce(lambda part, key: part.setdefault(key, {}), outer, arguments)
                # jsonargparse would pass null on as the text None.
                place[last] = value or ""
                with suppress(yaml.YAMLError):
                    place[last] = yaml.safe_load(value or "")
        presets.typed = [o for o in presets.typed if not o.name.startswith(f"{option}.")]
        class_path = f"robust_flatness.networks.{UserNetwork.__name__}"
        section = {"class_path": class_path, "init_args": {"path": path, "arguments": arguments}}
    presets.layers[0]["model"]["init_args"] = {"network": section}


def _network_in_file(network: Any) -> tuple[Any, dict[str, Any]]:
    """Class path and arguments of a network in a file, without the `UserNetwork` around it."""
    if not isinstance(network, Mapping):
        return network if isinstance(network, str) else None, {}
    path, arguments = network.get("class_path"), network.get("init_args") or {}
    if str(path).endswith(f".{UserNetwork.__name__}"):
        path, arguments = arguments.get("path"), arguments.get("arguments") or {}
    return path, dict(arguments)
