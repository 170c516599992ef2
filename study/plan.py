"""Which runs a study is made of: presets, sweeps and files of the user, times seeds.

Example:
    >>> plan = make_plan(rows=["at", "trades"], seeds=[0, 1], root=Path("runs"))
    >>> [run.name for run in plan]
    ['at-Digits-s0', 'at-Digits-s1', 'trades-Digits-s0', 'trades-Digits-s1']
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robust_flatness.configs.components import known_classes
from robust_flatness.configs.compose import CONFIGS, compose
from robust_flatness.configs.options import read_options

ROWS = sorted(path.stem for path in (CONFIGS / "table1").glob("*.yaml"))
# Measures that a study adds at the end of each run; any file or option wins over them.
EXTRAS = "--config=study.yaml"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        folder: Its run folder, whose name tells it from all others.
        method: Name of what is trained.
        data: Class of the data.
        seed: Its seed.
        epochs: That it trains.
        arguments: Of `fit`.
    """

    folder: Path
    method: str
    data: str
    seed: int
    epochs: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def make_plan(
    *,
    rows: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    configs: Sequence[str] = (),
    data: str = "Digits",
    seeds: Sequence[int] = (0,),
    root: Path = Path("runs"),
    options: Sequence[str] = (),
) -> list[PlannedRun]:
    """Lists the runs of a study, those of one preset together.

    Args:
        rows: Rows of Table 1 by name, or `all`.
        sweeps: Sweep files of W&B with the method `grid`, by path or by name, such as `trades`.
        configs: Config files, each of them a run.
        data: Class of the data.
        seeds: That each run is repeated with.
        root: Where the run folders are.
        options: Of `fit`, for all runs.

    Raises:
        ValueError: If nothing is asked for, a name or file is unknown, or two runs would share a
            folder.
    """
    chosen = [*_rows(rows), *_sweeps(sweeps), *((f"--config={file}",) for file in configs)]
    if not chosen:
        raise ValueError(
            "Expected `--rows`, `--sweep` or `--configs` to say what to train but got none."
        )
    if not seeds:
        raise ValueError("Expected `--seeds` to name at least one but got none.")
    known = known_classes()
    plan = [
        _planned(own, data, seed, root, tuple(options), known) for own in chosen for seed in seeds
    ]
    doubled = [name for name, count in Counter(run.name for run in plan).items() if count > 1]
    if doubled:
        raise ValueError(
            "Expected runs to differ in method, swept value or seed but got several called "
            f"{', '.join(doubled)}: give their files a `name` each."
        )
    return plan


def _rows(rows: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for row in ROWS if list(rows) == ["all"] else rows:
        if row not in ROWS:
            raise ValueError(
                f"Expected `--rows` to be all or some of {', '.join(ROWS)} but got {row}."
            )
        yield (f"--config=table1/{row}.yaml",)


def _sweeps(sweeps: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The arguments that W&B's agent would give to each run of the sweeps."""
    for sweep in sweeps:
        content = _read_sweep(sweep)
        command, parameters = content["command"], content["parameters"]
        fixed = command[command.index("fit") + 1 : command.index("${args}")]
        axes = [
            [f"--{name}={value}" for value in choice.get("values", [choice.get("value")])]
            for name, choice in parameters.items()
        ]
        yield from ((*fixed, *swept) for swept in itertools.product(*axes))


def _read_sweep(sweep: str) -> dict[str, Any]:
    name = sweep.removeprefix("configs/sweeps/").removesuffix(".yaml")
    files = [Path(sweep), CONFIGS / "sweeps" / f"{name}.yaml"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        known = sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.yaml"))
        raise ValueError(
            f"Expected `--sweep` to be a sweep file or one of {', '.join(known)} but got {sweep}."
        )
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        grid = content["method"] == "grid" and bool(content["parameters"])
        whole = {"fit", "${args}"} <= set(content["command"])
    except (TypeError, KeyError):
        grid = whole = False
    if not (grid and whole):
        raise ValueError(
            f"Expected `--sweep` to be a grid whose command holds fit and ${{args}} but got {file}."
        )
    return dict(content)


def _planned(
    own: tuple[str, ...],
    data: str,
    seed: int,
    root: Path,
    options: tuple[str, ...],
    known: dict[str, dict[str, str]],
) -> PlannedRun:
    # A set-up such as cifar10.yaml comes first, so that what a row says of its length still holds.
    given = read_options(options)
    files = [typed for o in given if o.name == "config" for typed in o.arguments]
    rest = [typed for o in given if o.name != "config" for typed in o.arguments]
    before = ("fit", EXTRAS, f"--data={data}", *files)
    arguments = (*before, *own, *rest, f"--seed_everything={seed}")
    composed = compose(arguments, known)
    settings = yaml.safe_load(composed[2])
    typed = {option.name: option.value for option in read_options(composed[3:])}
    method = str(typed.get("name") or settings.get("name") or _class(settings["model"]))
    shown = _class(settings["data"])
    swept = "".join(f"-{_slug(option)}" for option in own if not option.startswith("--config"))
    return PlannedRun(
        folder=root / f"{method}{swept}-{shown}-s{seed}",
        method=method,
        data=shown,
        seed=seed,
        epochs=int(typed.get("trainer.max_epochs") or settings["trainer"]["max_epochs"]),
        arguments=arguments,
    )


def _class(section: dict[str, Any]) -> str:
    return str(section["class_path"]).rsplit(".", 1)[-1]


def _slug(option: str) -> str:
    """A swept value as a part of a folder's name: `--model.lam=6.0` is `lam6.0`."""
    name, _, value = option.lstrip("-").partition("=")
    return re.sub(r"[^\w.+-]+", "_", f"{name.rsplit('.', 1)[-1]}{value}").strip("_")
