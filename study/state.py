"""How far the runs of a study are, read from their folders."""

import csv
import json
import shutil
import zipfile
from collections.abc import Mapping
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from robust_flatness.configs.options import read_options
from robust_flatness.run_folder.files import jsonable, write_json
from robust_flatness.run_folder.runs import load_run
from robust_flatness.study.plan import PlannedRun

# Differences in settings that an error tells one by one.
_TOLD = 3
_NONE = object()


class State(Enum):
    """Of a run: `FINISHED`, `CUT_OFF` with a checkpoint to go on from, or `NEW`."""

    FINISHED = "finished"
    CUT_OFF = "cut off"
    NEW = "new"


def state_of(run: PlannedRun) -> State:
    """Returns whether a run has finished, can go on, or starts anew.

    Results that no report could read are none, and a damaged checkpoint is none.

    Args:
        run: Of a plan.
    """
    try:
        load_run(run.folder)
    except (ValueError, OSError):
        # PyTorch's checkpoints are ZIP files, whose directory is at their end.
        return State.CUT_OFF if zipfile.is_zipfile(checkpoint_of(run)) else State.NEW
    return State.FINISHED


def checkpoint_of(run: PlannedRun) -> Path:
    """Where a run's last checkpoint is, once there is one."""
    return run.folder / "checkpoints" / "last.ckpt"


def epochs_done(run: PlannedRun) -> int:
    """Epochs that the run's table holds."""
    try:
        with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return min(run.epochs, sum(1 for _ in csv.DictReader(file)))
    except (OSError, ValueError, csv.Error):
        return 0


def book_of(run: PlannedRun, ending: str) -> Path:
    """A file that the study keeps of a run, beside the run folders: `study/<name>.<ending>`."""
    return run.folder.parent / "study" / f"{run.name}.{ending}"


def check_same_study(run: PlannedRun) -> None:
    """Refuses to take a run that was made with other settings for this one.

    Args:
        run: Of a plan.

    Raises:
        ValueError: If the folder holds such a run, or one that no study made.
    """
    if not run.folder.exists() or _is_bare(run.folder):
        return
    path = book_of(run, "json")
    try:
        before = _by_name(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"Expected `--root` to be free for the study but {run.folder} is a run that it did not "
            "start: choose another root."
        ) from None
    apart = _differing(before, _by_name(jsonable(run.settings)))
    if apart:
        more = f"; and {len(apart) - _TOLD} more" if len(apart) > _TOLD else ""
        raise ValueError(
            f"Expected the same settings for {run.folder} but it was trained "
            f"{'; '.join(apart[:_TOLD])}{more}: choose another root."
        )


def arguments_now(run: PlannedRun) -> list[str]:
    """What to call the command line with so that the run starts, or goes on.

    What an interrupted run left before the end of its first epoch is removed. A folder with a
    finished epoch but no whole checkpoint is moved to `study/<name>.left-1`, `.left-2` and so on.

    Args:
        run: Of a plan, not finished.
    """
    if state_of(run) is State.CUT_OFF:
        return ["fit", f"--ckpt_path={checkpoint_of(run)}"]
    if _holds_epoch(run.folder):
        _move_aside(run)
    elif run.folder.exists():
        shutil.rmtree(run.folder)
    write_json(book_of(run, "json"), {"arguments": run.arguments, "settings": run.settings})
    return [*run.arguments, f"--folder={run.folder}"]


def _holds_epoch(folder: Path) -> bool:
    """Whether anything in a folder comes from a finished epoch, be it damaged or not."""
    try:
        table = (folder / "metrics.csv").read_bytes().splitlines()
    except OSError:
        table = []
    if len(table) > 1 or (table and not table[0].startswith(b"epoch")):
        return True
    return any(folder.rglob("*.ckpt")) or any(folder.glob("results*.json"))


def _move_aside(run: PlannedRun) -> None:
    numbers = (book_of(run, f"left-{number}") for number in count(1))
    aside = next(path for path in numbers if not path.exists())
    aside.parent.mkdir(parents=True, exist_ok=True)
    run.folder.rename(aside)
    with book_of(run, "log").open("a", encoding="utf-8") as log:
        log.write(f"{run.folder} has no whole checkpoint to go on from: moved to {aside}\n")


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds no file at any depth, as after a start that failed."""
    inside = folder.rglob("*")
    return folder.is_dir() and all(path.is_dir() and not path.is_symlink() for path in inside)


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of files, and typed options by their names with dashes."""
    typed: dict[str, list[str]] = {}
    for name, value, _ in read_options(settings["typed"]):
        # What is typed more than once, such as `--list+=…`, may add up.
        typed.setdefault(f"--{name}", []).append("true" if value is None else value)
    return {**settings["files"], **{name: ",".join(values) for name, values in typed.items()}}


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    """Says of settings that are not the same what they were and are."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        inner = (
            _differing(before.get(k, _NONE), now.get(k, _NONE), f"{name}.{k}".lstrip("."))
            for k in keys
        )
        return [found for names in inner for found in names]
    if before == now:
        return []
    if before is _NONE:
        return [f"without {name}, now {now}"]
    return [f"with {name}={before}, now {'without' if now is _NONE else now}"]
