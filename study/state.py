"""A run of a study on disk, and the process that trains it.

The study keeps files of each run in `study/`, beside the run folders: `<name>.json` (arguments and
settings), `<name>.log` (output) and `<name>.lock`.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from robust_flatness.run_folder.files import jsonable, write_json
from robust_flatness.run_folder.runs import Run, find_runs, load_run
from robust_flatness.study.plan import PlannedRun

Process = subprocess.Popen[bytes]
PROGRAM = (sys.executable, "-m", "robust_flatness.cli")
# Settings that say where a run is written and watched.
_NO_RESULT = (
    *("folder", "project", "group", "log_checkpoints", "ckpt_path", "config"),
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir"),
)
# The number of different settings that an error message lists.
_LISTED = 3


class State(Enum):
    """State of a run: `FINISHED`, `CUT_OFF` with a checkpoint to resume from, or `NEW`."""

    FINISHED = "finished"
    CUT_OFF = "cut off"
    NEW = "new"


def state_of(run: PlannedRun) -> State:
    """Returns the state of a run. Damaged results and damaged checkpoints do not count."""
    if results_of(run):
        return State.FINISHED
    # PyTorch's checkpoints are ZIP files, whose directory is at the end of the file.
    return State.CUT_OFF if zipfile.is_zipfile(_checkpoint(run)) else State.NEW


def results_of(run: PlannedRun) -> Run | None:
    """Returns the results of a run, or None if it has not finished or no report can read it."""
    try:
        return load_run(run.folder)
    except (ValueError, OSError):
        return None


def epochs_done(run: PlannedRun) -> int:
    """Returns the number of epochs in the run's `metrics.csv`."""
    try:
        with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return min(run.epochs, sum(1 for _ in csv.DictReader(file)))
    except (OSError, ValueError, csv.Error):
        return 0


def study_file(run: PlannedRun, suffix: str) -> Path:
    """Returns the path `study/<name>.<suffix>`."""
    return run.folder.parent / "study" / f"{run.name}.{suffix}"


def check_same_study(
    run: PlannedRun, read_options: Callable[[Sequence[str]], Sequence[Any]]
) -> None:
    """Raises if the folder contains a run with other settings, or one that no study started."""
    if not run.folder.exists() or _is_empty(run.folder):
        return

    def flat(settings: Mapping[str, Any]) -> dict[str, str]:
        typed: dict[str, str] = {}
        for option in read_options(settings["typed"]):
            name, value = f"--{option.name}", "true" if option.value is None else option.value
            # An option that occurs more than once, such as `--list+=…`, may add up.
            typed[name] = f"{typed[name]},{value}" if name in typed else value
        return dict(_leaves(settings["files"])) | typed

    try:
        saved = json.loads(study_file(run, "json").read_text(encoding="utf-8"))
        before = flat(saved["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"Expected `--root` to be free for the study but {run.folder} is a run that it did not "
            "start: choose another root."
        ) from None
    now = flat(jsonable(run.settings))
    if changes := _changes(before, now, [*before, *now]):
        raise ValueError(
            f"Expected the same settings for {run.folder} but it was trained with {changes}: "
            "choose another root."
        )


def _changes(before: Mapping[str, str], now: Mapping[str, str], names: Sequence[str]) -> str:
    """Lists the settings of these names that have changed; empty if none has."""
    changes = [
        f"{name}={before.get(name, '(not set)')}, now {now.get(name, '(not set)')}"
        for name in dict.fromkeys(names)
        if before.get(name) != now.get(name)
    ]
    more = f"; and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
    return "; ".join(changes[:_LISTED]) + more


def use_kept_runs(
    plan: Sequence[PlannedRun],
    folders: Sequence[str],
    all_settings: Callable[[Sequence[str]], Mapping[str, Any]],
) -> tuple[list[PlannedRun], list[str]]:
    """Replaces runs of a plan by finished ones of the same name and settings in other folders.

    A run that has finished in the folder of the study stays. Settings are compared as a whole, with
    the defaults of all arguments, except those that change no result (`_NO_RESULT`) and defaults
    that the kept run does not state, because they are newer. The data may lie elsewhere, in a
    folder of the same name, or for CIFAR in any.

    Returns:
        The plan, and a sentence for each kept run of the same name that is not used.

    Raises:
        ValueError: If one of the folders does not exist.
    """
    kept: dict[str, list[Run]] = {}
    for folder in folders:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"Expected `--finished` to name folders but got {folder}.")
        for run in find_runs(path.resolve())[0]:
            kept.setdefault(run.name, []).append(run)
    result, sentences = [], []
    for planned in plan:
        same_name = kept.get(planned.name, []) if results_of(planned) is None else []
        if same_name:
            now = _comparable(jsonable(all_settings(planned.arguments)))
            asked = {*_comparable(jsonable(planned.settings["files"]))}
            asked |= {part.lstrip("-").partition("=")[0] for part in planned.settings["typed"]}
        for run in same_name:
            before = _comparable(run.settings)
            names = [*before, *sorted(asked & now.keys() - before.keys())]
            if not (changes := _changes(before, now, names)):
                planned = replace(planned, folder=run.folder)
                break
            sentences.append(f"{run.folder} is not used, as it was trained with {changes}.")
        result.append(planned)
    return result, sentences


def _comparable(settings: Mapping[str, Any]) -> dict[str, str]:
    leaves = ((name.replace(".init_args", ""), value) for name, value in _leaves(settings))
    # An empty mapping and a missing one are the same.
    compared = {
        name: value
        for name, value in leaves
        if value not in ("None", "{}") and not name.startswith(_NO_RESULT)
    }
    root = Path(compared.pop("data.root", "")).name
    is_cifar = compared.get("data.class_path", "").rsplit(".", 1)[-1] in ("CIFAR10", "CIFAR100")
    return compared | ({"data.root": root} if root and not is_cifar else {})


def start(run: PlannedRun, environment: Mapping[str, str] | None = None) -> Process | None:
    """Starts or resumes a run in a new process, unless another one trains it or has finished it.

    The process holds a lock as long as it lives, even if the study is killed, so that no second
    process writes to the same folder. It is a session of its own: Ctrl-C reaches the study alone,
    which then ends its runs. `environment` is in addition to that of this process.
    """
    lock = _acquire_lock(run)
    if lock is None:
        return None
    try:
        if state_of(run) is State.FINISHED:
            return None
        command = [*PROGRAM, *_prepare(run)]
        os.ftruncate(lock, 0)
        os.write(lock, socket.gethostname().encode())
        with study_file(run, "log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                # The lock lasts as long as the run has this file open.
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)


def is_running(run: PlannedRun) -> bool:
    """Returns whether any process trains the run."""
    lock = _acquire_lock(run)
    if lock is not None:
        os.close(lock)
    return lock is None


def runs_here(run: PlannedRun) -> bool:
    """Returns whether the last process that trained the run is one of this machine."""
    path = study_file(run, "lock")
    return path.is_file() and path.read_text() == socket.gethostname()


def _acquire_lock(run: PlannedRun) -> int | None:
    """An open lock file, or `None` if another process holds the lock."""
    try:
        import fcntl
    except ImportError as error:
        raise ValueError("Expected Linux or macOS for `study` but got Windows.") from error
    path = study_file(run, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        raise ValueError(
            f"Expected `--root` to be on a file system with locks but got {path.parent}: {error}."
        ) from error
    return file


def _prepare(run: PlannedRun) -> list[str]:
    """Prepares the folder, and returns the arguments that start or resume the run.

    A folder without a finished epoch is removed. A folder with a finished epoch but without an
    undamaged checkpoint moves to `study/<name>.left-1`, `.left-2` and so on.
    """
    if state_of(run) is State.CUT_OFF:
        return ["fit", f"--ckpt_path={_checkpoint(run)}"]
    if _has_epoch(run.folder):
        places = (study_file(run, f"left-{number}") for number in count(1))
        aside = next(path for path in places if not path.exists())
        run.folder.rename(aside)
        with study_file(run, "log").open("a", encoding="utf-8") as log:
            log.write(f"{run.folder} has no undamaged checkpoint: moved to {aside}\n")
    elif run.folder.exists():
        shutil.rmtree(run.folder)
    write_json(study_file(run, "json"), {"arguments": run.arguments, "settings": run.settings})
    return [*run.arguments, f"--folder={run.folder}"]


def _checkpoint(run: PlannedRun) -> Path:
    return run.folder / "checkpoints" / "last.ckpt"


def _has_epoch(folder: Path) -> bool:
    """Whether a folder contains files of a finished epoch, damaged or not."""
    table = folder / "metrics.csv"
    lines = table.read_bytes().splitlines() if table.is_file() else []
    is_damaged = bool(lines) and not lines[0].startswith(b"epoch")
    files = (*folder.rglob("*.ckpt"), *folder.glob("results*.json"))
    return len(lines) > 1 or is_damaged or bool(files)


def _is_empty(folder: Path) -> bool:
    """Whether a folder contains no file at any depth, as after a start that failed."""
    content = folder.rglob("*")
    return folder.is_dir() and all(path.is_dir() and not path.is_symlink() for path in content)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, str(value)
