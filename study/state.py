"""How far the runs of a study are, read from their folders."""

import csv
import json
import shutil
from enum import Enum
from pathlib import Path

from robust_flatness.reporting.json_file import write_json
from robust_flatness.study.plan import PlannedRun


class State(Enum):
    """Of a run: `FINISHED`, `CUT_OFF` with a checkpoint to go on from, or `NEW`."""

    FINISHED = "finished"
    CUT_OFF = "cut off"
    NEW = "new"


def state_of(run: PlannedRun) -> State:
    """Returns whether a run has finished, can go on, or starts anew.

    Args:
        run: Of a plan.
    """
    if (run.folder / "results.json").is_file():
        return State.FINISHED
    return State.CUT_OFF if checkpoint_of(run).is_file() else State.NEW


def checkpoint_of(run: PlannedRun) -> Path:
    """Where a run's last checkpoint is, once there is one."""
    return run.folder / "checkpoints" / "last.ckpt"


def epochs_done(run: PlannedRun) -> int:
    """Epochs that the run's table holds."""
    if state_of(run) is State.FINISHED:
        return run.epochs
    try:
        with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.DictReader(file))
    except OSError:
        return 0


def book_of(run: PlannedRun, ending: str) -> Path:
    """A file that the study keeps of a run, beside the run folders: `study/<name>.<ending>`."""
    return run.folder.parent / "study" / f"{run.name}.{ending}"


def check_same_study(run: PlannedRun) -> None:
    """Refuses to take a run that was made with other arguments for this one.

    Args:
        run: Of a plan.

    Raises:
        ValueError: If the folder holds such a run, or one that no study made.
    """
    if not run.folder.exists():
        return
    path = book_of(run, "json")
    before = json.loads(path.read_text(encoding="utf-8"))["arguments"] if path.is_file() else None
    if before is None:
        raise ValueError(
            f"Expected `--root` to be free for the study but {run.folder} is a run of its own: "
            "choose another root."
        )
    if before != list(run.arguments):
        raise ValueError(
            f"Expected the arguments that {run.folder} was trained with, {' '.join(before[1:])}, "
            f"but got {' '.join(run.arguments[1:])}: choose another root."
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
    write_json(book_of(run, "json"), {"arguments": list(run.arguments)})
    return [*run.arguments, f"--folder={run.folder}"]
