"""Which runs a study consists of: presets, sweep files and config files, each with its seeds."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS = sorted(path.stem for path in (CONFIGS / "table1").glob("*.yaml"))
# Measures that a study adds at the end of each run. Every other file and option overrides them.
_EXTRAS = f"--config={CONFIGS / 'study.yaml'}"
# The plan sets these for each run.
_SET_BY_PLAN = ("name", "data", "seed_everything", "folder", "ckpt_path")
_MAX_SEED = 2**32 - 1


class CommandLine(NamedTuple):
    """The functions of the command line, a layer above, that a study calls.

    Attributes:
        read_options: Splits arguments into options, as `read_options` of the command line does.
        merge_settings: Merges presets and files; also returns the remaining arguments.
        check_arguments: Raises a `ValueError` if `fit` refuses the arguments.
        read_yaml: Reads the mapping in a YAML file, which error messages call by an option's name.
        all_settings: All settings of a run with these arguments, as in its `results.json`.
    """

    read_options: Callable[[Sequence[str]], Sequence[Any]]
    merge_settings: Callable[[Sequence[str]], tuple[Mapping[str, Any], Sequence[str]]]
    check_arguments: Callable[[Sequence[str]], None]
    read_yaml: Callable[[str, str], Mapping[str, Any]]
    all_settings: Callable[[Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        folder: The run folder. Its name identifies the run.
        data: Class name of the datamodule.
        epochs: Number of epochs to train.
        arguments: Arguments of the command line, beginning with `fit`.
        settings: `files`, the merged settings of all files, and `typed`, the remaining arguments.
    """

    folder: Path
    data: str
    epochs: int
    arguments: tuple[str, ...]
    settings: Mapping[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def stem(self) -> str:
        """The folder's name without the seed."""
        return self.name.rsplit("-s", 1)[0]


def make_plan(
    command_line: CommandLine,
    *,
    rows: Sequence[str] = (),
    sweep: Sequence[str] = (),
    configs: Sequence[str] = (),
    data: str | None = None,
    seeds: Sequence[int] = (0,),
    root: Path = Path("runs"),
    options: Sequence[str] = (),
) -> list[PlannedRun]:
    """Lists the runs of a study, with the seeds of one preset after each other.

    Config files among the options are merged before those of the rows, so that a row may still
    train shorter than `cifar10.yaml` says. All other options override the rows.

    Raises:
        ValueError: If there is nothing to train, a name or file is unknown, an option cannot apply
            to all runs, or two runs would share a folder.
    """
    chosen: list[tuple[tuple[str, ...], str]]
    chosen = [((f"--config={file}",), "") for file in _config_files(rows, configs)]
    chosen += itertools.chain(*(_sweep_runs(file, command_line.read_yaml) for file in sweep))
    if not chosen:
        raise ValueError(
            "Expected `--rows`, `--sweep` or `--configs` to say what to train but got none."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected `--seeds` to be different numbers but got {list(seeds)}.")
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"Expected `--seeds` to be in [0, {_MAX_SEED}] but got {seed}.")
    before: list[str] = [] if data is None else [f"--data={data}"]
    after: list[str] = []
    for option in command_line.read_options(options):
        if option.name in _SET_BY_PLAN:
            raise ValueError(
                f"Expected options behind `--` to be for all runs but got --{option.name}, which "
                "the plan sets for each run."
            )
        (before if option.name == "config" else after).extend(option.arguments)
    plan = []
    for own, swept in chosen:
        arguments = ("fit", _EXTRAS, *before, *own, *after)
        plan += _seeded_runs(arguments, swept, seeds, root, command_line)
    doubled = [name for name, count in Counter(run.name for run in plan).items() if count > 1]
    if doubled:
        raise ValueError(
            "Expected runs to differ in method, swept value or seed but got several called "
            f"{', '.join(doubled)}: list each once, or set `name` in their files."
        )
    return plan


def _seeded_runs(
    arguments: tuple[str, ...],
    swept: str,
    seeds: Sequence[int],
    root: Path,
    command_line: CommandLine,
) -> list[PlannedRun]:
    files, rest = command_line.merge_settings(arguments)
    typed = {option.name: option.value for option in command_line.read_options(rest)}
    model, data = (files[key]["class_path"].rsplit(".", 1)[-1] for key in ("model", "data"))
    method = str(typed.get("name") or files.get("name") or model)
    if Path(method).name != method:
        raise ValueError(f"Expected `--name` to be a folder's name but got {method!r}.")
    epochs = typed.get("trainer.max_epochs", files["trainer"].get("max_epochs"))
    with suppress(TypeError, ValueError):
        epochs = int(epochs)
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"Expected `trainer.max_epochs` to be >= 1 but got {epochs}.")
    stem = "-".join(filter(None, (method, re.sub(r"[^\w.+-]+", "_", swept).strip("_"), data)))
    settings = {"files": files, "typed": list(rest)}
    seeded = {seed: (*arguments, f"--seed_everything={seed}") for seed in seeds}
    return [
        PlannedRun(root / f"{stem}-s{seed}", data, epochs, typed, settings)
        for seed, typed in seeded.items()
    ]


def _config_files(rows: Sequence[str], configs: Sequence[str]) -> Iterator[str]:
    for row in ROWS if list(rows) == ["all"] else rows:
        if row not in ROWS:
            raise ValueError(
                f"Expected `--rows` to be all, or some of {', '.join(ROWS)}, but got "
                f"{', '.join(rows)}."
            )
        yield str(CONFIGS / "table1" / f"{row}.yaml")
    for file in configs:
        preset = CONFIGS / file.removeprefix("configs/")
        paths = (Path(file).expanduser(), preset, preset.with_name(f"{preset.name}.yaml"))
        if not any(path.is_file() for path in paths):
            raise ValueError(f"Expected `--configs` to name files but {file} does not exist.")
        yield file


def _sweep_runs(
    sweep: str, read_yaml: Callable[[str, str], Mapping[str, Any]]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The runs of a W&B sweep file: arguments of `fit`, and the swept values, such as `lam1.0`."""
    name = sweep.removeprefix("configs/sweeps/").removesuffix(".yaml")
    paths = (Path(sweep).expanduser(), CONFIGS / "sweeps" / f"{name}.yaml")
    file = next((path for path in paths if path.is_file()), None)
    if file is None:
        known = ", ".join(sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.yaml")))
        raise ValueError(
            f"Expected `--sweep` to be a sweep file or one of {known} but got {sweep}."
        )
    content = read_yaml(str(file), "--sweep")
    if content.get("method") != "grid":
        raise ValueError(
            f"Expected `--sweep` to have the method grid but {file} has {content.get('method')}."
        )
    command = content.get("command")
    if not isinstance(command, list) or not {"fit", "${args}"} <= set(map(str, command)):
        raise ValueError(
            f"Expected the command of `--sweep` to be a list with fit and ${{args}} but {file} has "
            f"{command}."
        )
    try:
        axes = [
            [(name, value) for value in (axis["values"] if "values" in axis else [axis["value"]])]
            for name, axis in content["parameters"].items()
        ]
    except (AttributeError, KeyError, TypeError):
        axes = []
    if not axes:
        raise ValueError(
            "Expected the parameters of `--sweep` to have `values` or a `value` each but those of "
            f"{file} do not."
        )
    command = [str(part) for part in command]
    start, place = command.index("fit") + 1, command.index("${args}")
    for swept in itertools.product(*axes):
        values = [f"--{name}={value}" for name, value in swept]
        text = "-".join(itertools.chain(*(_short(name, value) for name, value in swept)))
        yield (*command[start:place], *values, *command[place + 1 :]), text


def _short(name: str, value: Any) -> list[str]:
    """A swept value for the folder's name. For a mapping, such as a whole config, its leaves."""
    content = value
    if isinstance(value, str):
        # The option itself refuses text that is not YAML.
        with suppress(yaml.YAMLError):
            content = yaml.safe_load(value)
    if isinstance(content, Mapping):
        return [text for inner in content.items() for text in _short(*inner)]
    # The folder's name already begins with the run's name.
    return [] if name == "name" else [f"{name.rsplit('.', 1)[-1]}{value}"]


def counted(runs: int) -> str:
    """Returns a number of runs in words, such as `1 run` and `57 runs`."""
    return f"{runs} run{'' if runs == 1 else 's'}"


def print_plain(console: Console, text: str) -> None:
    """Prints names, paths and errors, which may contain brackets that are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def split_names(names: list[str] | str) -> list[str]:
    """Returns the names in a list, or in a text with commas."""
    names = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in names if name.strip()]
