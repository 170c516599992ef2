"""One configuration out of presets, a run's own, the user's files and the command line.

Later ones win: the preset of the chosen data, the `config.yaml` of a checkpoint's run, the user's
`--config` files in order, the command line. A default class is named only where nobody chose one,
and before anything else, because jsonargparse hands the arguments of a default class on to the
class that replaces it.

Two keys of files are ours: `on_data` holds, by the data's class name, what a file says on that data
alone, and `epochs_share` multiplies the epochs that the layers before it ask for, so that a preset
can be shorter than the baseline on any data. Files of the package are found by name, from anywhere.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from robust_flatness.command_line.files import check_layer, read_mapping
from robust_flatness.command_line.network_option import (
    drop_other_networks,
    place_network,
    typed_network,
)
from robust_flatness.command_line.options import Option, read_options
from robust_flatness.command_line.suggestions import options_of
from robust_flatness.functional.checks import check_number
from robust_flatness.lightning_modules.loading import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"
DEFAULT_CLASSES = {"model": "AT", "data": "Digits"}
OUR_KEYS = ("on_data", "epochs_share")
# The class of networks that were trained elsewhere: what a preset says of training is not for it.
EXTERNAL = "External"


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
    subcommand, options = arguments[0], read_options(arguments[1:])
    files = [_read(o.value or "") for o in options if o.name in ("config", "c")]
    run, resumed = _settings_of_checkpoint(options, files)
    classes = {
        key: _chosen(key, options, [*files[::-1], run], known[key]) for key in DEFAULT_CLASSES
    }
    if run and classes["model"] != run["model"].get("class_path", classes["model"]):
        raise ValueError(
            f"Expected `--model` to be {_short(run['model']['class_path'])}, which wrote the "
            f"checkpoint, but got {_short(classes['model'])}."
        )
    external = _short(classes["model"]) == EXTERNAL
    for option in options:
        if re.search(r"\s", option.name):
            raise ValueError(f"Expected an option without spaces but got `--{option.name}`.")
        # Networks of others have names of their own, or class paths.
        _check_name(option, {k: v for k, v in known.items() if not external or k == "data"})
    preset = _preset(classes["data"])
    if external or classes["model"] not in known["model"].values():
        _leave_to_own(preset, classes["model"])
    layers = [_read(str(DEFAULTS)), preset, run, *files]
    shares = [option.value for option in options if option.name == "epochs_share"]
    if shares and resumed:
        raise ValueError(
            "Expected no `--epochs_share` for a run that goes on, whose length is known, but got "
            f"{shares[-1]}."
        )
    layers += [{"epochs_share": share} for share in shares[-1:]]
    # A model of the user's own may mean something else by `network`.
    own, networks = classes["model"] in known["model"].values(), known.get("model.network", {})
    network = typed_network(options, networks) if own else None
    if network is not None:
        for layer in layers:
            drop_other_networks(layer, network, networks)
    merged = _stacked(layers, classes["data"], known["data"], resumed=resumed)
    for key, name in classes.items():
        merged[key] = {**merged.get(key, {}), "class_path": name}
    consumed = ("config", "c", "epochs_share", *DEFAULT_CLASSES)
    kept = [option for option in options if option.name not in consumed]
    if own:
        settings = merged["model"].get("init_args", {})
        kept = place_network(settings, kept, networks, external=external)
        merged["model"] |= {"init_args": settings} if settings else {}
    typed = [typed for option in sorted(kept, key=_depth) for typed in option.arguments]
    return [subcommand, "--config", yaml.safe_dump(merged), *typed]


def _leave_to_own(preset: dict[str, Any], model: str) -> None:
    """Drops what a preset says of a model to a class of the user's own that does not take it."""
    if "model" not in preset:
        return
    taken = set() if _short(model) == EXTERNAL else set(options_of(model))
    settings = preset["model"].get("init_args", {})
    preset["model"] = {"init_args": {k: v for k, v in settings.items() if k in taken}}


def _preset(data: str) -> dict[str, Any]:
    """The preset that a data set brings along, if it has one."""
    file = CONFIGS / "data" / f"{_snake(data)}.yaml"
    return _read(str(file)) if file.is_file() else {}


def _stacked(
    layers: Sequence[Mapping[str, Any]], data: str, known: Mapping[str, str], *, resumed: bool
) -> dict[str, Any]:
    """The layers in one mapping, later ones on top, without the keys that are ours."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for part in (layer, _on_data(layer, data, known)):
            plain = {key: value for key, value in part.items() if key not in OUR_KEYS}
            for key in DEFAULT_CLASSES:
                if isinstance(plain.get(key), str):
                    plain[key] = {"class_path": plain[key]}
            merged = _merge(merged, plain)
            if "epochs_share" in part and not resumed:
                # A resumed run's epochs are those of its share already.
                merged["trainer"]["max_epochs"] = _share(merged, part["epochs_share"])
    return merged


def _on_data(layer: Mapping[str, Any], data: str, known: Mapping[str, str]) -> Mapping[str, Any]:
    """What a layer says on the chosen data alone."""
    sections = layer.get("on_data", {})
    if not isinstance(sections, dict) or not all(isinstance(v, dict) for v in sections.values()):
        raise ValueError(f"Expected `on_data` to hold a mapping a data set but got {sections}.")
    for name in sections:
        # A class path may be one of the user's own.
        if name not in known and "." not in str(name):
            raise ValueError(
                f"Expected `on_data` to name some of {', '.join(sorted(known))}, or class paths, "
                f"but got {name}."
            )
    chosen = [sections[name] for name in (_short(data), data) if name in sections]
    return chosen[0] if chosen else {}


def _share(merged: Mapping[str, Any], share: Any) -> int:
    """The epochs that the layers so far ask for, times a share, at least one."""
    try:
        check_number("epochs_share", float(share), low=sys.float_info.min)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected `epochs_share` to be a number > 0 but got {share}.") from error
    if not isinstance(merged["trainer"]["max_epochs"], int):
        raise ValueError(
            "Expected `--trainer.max_epochs` to be an integer beside `epochs_share` but got "
            f"{merged['trainer']['max_epochs']}."
        )
    return max(1, round(merged["trainer"]["max_epochs"] * float(share)))


def run_folder_of(checkpoint: str | None) -> Path | None:
    """The run folder that a checkpoint lies in, if it lies in one.

    Args:
        checkpoint: Path of a checkpoint, `<run folder>/checkpoints/<name>.ckpt`.
    """
    if not checkpoint:
        return None
    folder = Path(checkpoint.replace("\0", "")).expanduser().resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def _depth(option: Option) -> int:
    """Sorts inner arguments of model and data behind the classes that own them."""
    return option.name.count(".") if option.name.split(".")[0] in DEFAULT_CLASSES else 99


def _read(given: str) -> dict[str, Any]:
    """A YAML file, one of the package's by its name there, or a mapping written out."""
    written = given.lstrip().startswith("{")
    name = given if written else str(_file(given))
    content = read_mapping(name, given if written else None)
    check_layer(content, name)
    return content


def _file(path: str) -> Path:
    name = path.removeprefix("configs/")
    for file in (Path(path).expanduser(), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if "\0" not in path and file.is_file():
            return file
    files = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("table1/*.yaml")]
    presets = sorted({str(p.relative_to(CONFIGS)) for p in files} - {"defaults.yaml", "study.yaml"})
    near = get_close_matches(name, presets, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(presets)}."
    raise ValueError(f"Expected `--config` to be a YAML file but got {path or 'nothing'}; {known}")


def _settings_of_checkpoint(
    options: Sequence[Option], files: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """The settings that a checkpoint brings, and whether it is one of a run that goes on.

    In a run folder they are the run's `config.yaml`, elsewhere the model's hyperparameters.
    """
    paths = [file["ckpt_path"] for file in files if file.get("ckpt_path")]
    paths += [option.value for option in options if option.name == "ckpt_path"]
    path = str(paths[-1] or "") if paths else ""
    folder = run_folder_of(path)
    if folder is not None:
        return read_run_config(folder), True
    if not Path(path).is_file():
        return {}, False
    saved = read_checkpoint(path, "--ckpt_path").get("hyper_parameters")
    saved = saved if isinstance(saved, dict) else {}
    arguments = {k: v for k, v in saved.items() if k not in ("_class_path", "_instantiator")}
    chosen = {"class_path": saved["_class_path"]} if "_class_path" in saved else {}
    return {"model": {**chosen, "init_args": arguments}} if saved else {}, False


def read_run_config(folder: Path) -> dict[str, Any]:
    """The settings of a run, without the checkpoint that it went on from.

    Args:
        folder: The run folder.

    Raises:
        ValueError: If its `config.yaml` is not one that a run writes.
    """
    file = str(folder / "config.yaml")
    config = read_mapping(file, option="--ckpt_path")
    check_layer(config, file)
    for key in DEFAULT_CLASSES:
        part = config.get(key)
        if not isinstance(part, dict) or not part.get("class_path"):
            raise ValueError(
                f"Expected `--ckpt_path` to lie in a run folder whose config.yaml holds the class "
                f"of `{key}` but got {part} in {file}."
            )
    config.pop("ckpt_path", None)
    return config


def _chosen(
    key: str,
    options: Sequence[Option],
    files: Sequence[Mapping[str, Any]],
    known: Mapping[str, str],
) -> str:
    """The class path of model or data: typed, else from the last file that names one."""
    typed = [option.value or "" for option in options if option.name == key]
    names = typed[::-1]
    for content in files:
        choice = content.get(key) or {}
        names.append(choice if isinstance(choice, str) else choice.get("class_path") or "")
    if not all(re.fullmatch(r"[\w.]+", name) and name != "null" for name in typed):
        raise ValueError(
            f"Expected `--{key}` to be a class, or a class path such as package.Class, but got "
            f"{names[0] or 'nothing'}."
        )
    name = next(filter(None, names), DEFAULT_CLASSES[key])
    _check_name(Option(key, name, ()), {key: known})
    return known.get(name, name)


def _check_name(option: Option, known: Mapping[str, Mapping[str, str]]) -> None:
    names, name = known.get(option.name.rstrip("+")), option.value
    if names is None or name is None:
        return
    # Anything but a bare word is a class path, or YAML that the parser reads.
    if name.isidentifier() and name not in names and name != "null":
        raise ValueError(
            f"Expected `--{option.name}` to be one of {', '.join(sorted(names))}, or a class "
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
