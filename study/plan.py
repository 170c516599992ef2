"""Which runs a study is made of: presets, sweeps and files of the user, times seeds.

Example:
    >>> plan = make_plan(rows=["at", "trades"], seeds=[0, 1], root=Path("runs"))
    >>> [run.name for run in plan]
    ['at-Digits-s0', 'at-Digits-s1', 'trades-Digits-s0', 'trades-Digits-s1']
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from robust_flatness.command_line.checks import check_seed
from robust_flatness.command_line.components import known_classes
from robust_flatness.command_line.compose import CONFIGS, compose
from robust_flatness.command_line.options import read_options
from robust_flatness.study.sweeps import sweep_runs

ROWS = sorted(path.stem for path in (CONFIGS / "table1").glob("*.yaml"))
# Measures that a study adds at the end of each run; any file or option wins over them.
_EXTRAS = f"--config={CONFIGS / 'study.yaml'}"
# What a plan says of each run itself.
_OWN = ("name", "data", "seed_everything", "folder", "ckpt_path")


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
        settings: What these say once all files are read.
    """

    folder: Path
    method: str
    data: str
    seed: int
    epochs: int
    arguments: tuple[str, ...]
    settings: Mapping[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def stem(self) -> str:
        """The name without the seed."""
        return stem_of(self.name)


class _Chosen(NamedTuple):
    arguments: tuple[str, ...]
    swept: str = ""


def make_plan(
    *,
    rows: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    configs: Sequence[str] = (),
    data: str | None = None,
    seeds: Sequence[int] = (0,),
    root: Path = Path("runs"),
    options: Sequence[str] = (),
) -> list[PlannedRun]:
    """Lists the runs of a study, those of one preset together.

    Args:
        rows: Rows of Table 1 by name, or `all`.
        sweeps: Sweep files of W&B with the method `grid`, by path or by name, such as `trades`.
        configs: Config files, each of them a run.
        data: Class of the data; `None` is what a file names, else Digits.
        seeds: That each run is repeated with.
        root: Where the run folders are.
        options: Of `fit`, for all runs. Files among them stand below the rows, so that a row may
            still be shorter than a set-up such as `cifar10.yaml`; other options stand above.

    Raises:
        ValueError: If nothing is asked for, a name or file is unknown, an option belongs to each
            run alone, or two runs would share a folder.
    """
    chosen = [
        *_rows(rows),
        *(_Chosen(*run) for sweep in sweeps for run in sweep_runs(sweep)),
        *_files(configs),
    ]
    if not chosen:
        raise ValueError(
            "Expected `--rows`, `--sweep` or `--configs` to say what to train but got none."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected `--seeds` to be different numbers but got {list(seeds)}.")
    for seed in seeds:
        check_seed("--seeds", seed)
    before, after = _split(options)
    typed = [] if data is None else [f"--data={data}"]
    known = known_classes()
    plan = []
    for own in chosen:
        arguments = ("fit", _EXTRAS, *typed, *before, *own.arguments, *after)
        plan += [_planned(arguments, own.swept, seed, root, known) for seed in seeds]
    doubled = [name for name, count in Counter(run.name for run in plan).items() if count > 1]
    if doubled:
        raise ValueError(
            "Expected runs to differ in method, swept value or seed but got several called "
            f"{', '.join(doubled)}: name each once, or give their files a `name` each."
        )
    return plan


def stem_of(name: str) -> str:
    """The name of a run without its seed.

    Example:
        >>> stem_of("at_awp-Digits-s0")
        'at_awp-Digits'
    """
    return name.rsplit("-s", 1)[0]


def counted(runs: int) -> str:
    """A number of runs in words.

    Example:
        >>> counted(1), counted(57)
        ('1 run', '57 runs')
    """
    return f"{runs} run{'' if runs == 1 else 's'}"


def _rows(rows: Sequence[str]) -> Iterator[_Chosen]:
    for row in ROWS if list(rows) == ["all"] else rows:
        if row not in ROWS:
            raise ValueError(
                f"Expected `--rows` to be all, or some of {', '.join(ROWS)}, but got "
                f"{', '.join(rows)}."
            )
        yield _Chosen((f"--config={CONFIGS / 'table1' / f'{row}.yaml'}",))


def _files(configs: Sequence[str]) -> Iterator[_Chosen]:
    for file in configs:
        inside = CONFIGS / file.removeprefix("configs/")
        places = (Path(file).expanduser(), inside, inside.with_name(f"{inside.name}.yaml"))
        if not any(place.is_file() for place in places):
            raise ValueError(f"Expected `--configs` to name files but {file} does not exist.")
        yield _Chosen((f"--config={file}",))


def _split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files among the options of `fit`, and the others."""
    before: list[str] = []
    after: list[str] = []
    for option in read_options(options):
        if option.name in _OWN:
            raise ValueError(
                f"Expected options behind `--` to be for all runs but got --{option.name}, which "
                "the plan gives to each."
            )
        (before if option.name == "config" else after).extend(option.arguments)
    return before, after


def _planned(
    arguments: tuple[str, ...],
    swept: str,
    seed: int,
    root: Path,
    known: Mapping[str, Mapping[str, str]],
) -> PlannedRun:
    composed = compose(arguments, known)
    settings = yaml.safe_load(composed[2])
    typed = {option.name: option.value for option in read_options(composed[3:])}
    method = str(typed.get("name") or settings.get("name") or _class(settings["model"]))
    if Path(method).name != method:
        raise ValueError(f"Expected `--name` to be a folder's name but got {method!r}.")
    data = _class(settings["data"])
    return PlannedRun(
        folder=root / f"{method}{f'-{_slug(swept)}' if swept else ''}-{data}-s{seed}",
        method=method,
        data=data,
        seed=seed,
        epochs=_epochs(typed.get("trainer.max_epochs", settings["trainer"].get("max_epochs"))),
        arguments=(*arguments, f"--seed_everything={seed}"),
        settings={"files": settings, "typed": list(composed[3:])},
    )


def _epochs(given: Any) -> int:
    try:
        epochs = int(given)
    except (TypeError, ValueError):
        epochs = 0
    if epochs < 1:
        raise ValueError(f"Expected `trainer.max_epochs` to be >= 1 but got {given}.")
    return epochs


def _class(section: Mapping[str, Any]) -> str:
    return str(section["class_path"]).rsplit(".", 1)[-1]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
