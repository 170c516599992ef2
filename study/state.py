"""How far the runs of a study are, read from their folders."""

import csv
import json
import shutil
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from robust_flatness.reporting.json_file import jsonable, write_json
from robust_flatness.reporting.runs import read_run
from robust_flatness.study.plan import PlannedRun


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
        read_run(run.folder)
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
    except OSError:
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
    if not run.folder.exists():
        return
    path = book_of(run, "json")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"Expected `--root` to be free for the study but {run.folder} is a run that it did not "
            "start: choose another root."
        ) from None
    apart = _differing(before, jsonable(run.settings))
    if apart:
        raise ValueError(
            f"Expected the settings that {run.folder} was trained with but {', '.join(apart)} "
            "differ: choose another root."
        )


def arguments_now(run: PlannedRun) -> list[str]:
    """What to call the command line with so that the run starts, or goes on.

    What an interrupted run left before its first checkpoint is removed.

    Args:
        run: Of a plan, not finished.
    """
    if state_of(run) is State.CUT_OFF:
        return ["fit", f"--ckpt_path={checkpoint_of(run)}"]
    if run.folder.exists():
        shutil.rmtree(run.folder)
    write_json(book_of(run, "json"), {"arguments": run.arguments, "settings": run.settings})
    return [*run.arguments, f"--folder={run.folder}"]


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    """Names of settings that are not the same."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        inner = (_differing(before.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
        return [found for names in inner for found in names]
    return [] if before == now else [name.removeprefix("files.")]
