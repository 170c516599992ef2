"""`python cli.py study`: trains a list of runs, and continues after it was stopped."""

import math
import os
import shlex
import statistics
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robust_flatness.run_folder.environment import started_as
from robust_flatness.study.elsewhere import submit, write_sweep
from robust_flatness.study.plan import (
    CommandLine,
    PlannedRun,
    counted,
    make_plan,
    print_plain,
    split_names,
)
from robust_flatness.study.pool import Pool
from robust_flatness.study.state import (
    State,
    check_same_study,
    epochs_done,
    results_of,
    state_of,
    study_file,
    use_kept_runs,
)

_MAX_SEEDS = 10_000
# To check the arguments of one run takes about half a second.
_CHECKED = 3


def study(
    command_line: CommandLine,
    rows: list[str] | str = "",
    sweep: list[str] | str = "",
    configs: list[str] | str = "",
    data: str | None = None,
    seeds: int | list[int] = 1,
    root: Path = Path("runs"),
    only: list[str] | str = "",
    jobs: int | None = None,
    devices: list[int] | None = None,
    dry_run: bool = False,
    slurm: dict[str, Any] | None = None,
    sweep_file: Path | None = None,
    finished: list[str] | str = "",
    options: list[str] | None = None,
) -> None:
    """Trains rows of Table 1, sweeps or your own config files, with one or more seeds.

    Runs that have finished are skipped, runs that were cut off resume from their last checkpoint,
    and a run that fails does not stop the others. Options of `fit` for all runs follow `--`, such
    as `python cli.py study --rows all --seeds 3 -- --trainer.max_epochs=20`.

    Args:
        command_line: Functions of the command line.
        rows: Rows of Table 1: all, or names such as at,at_awp.
        sweep: Sweep files, by path or by name, such as trades,mart.
        configs: Config files. Each is one run.
        data: Class name of the datamodule. By default the one that a file names, else Digits.
        seeds: Number of seeds, counted from 0, or a list such as [3,4].
        root: The folder that contains the run folders.
        only: Names of runs of the plan. Only these are trained, such as at-Digits-s0.
        jobs: Number of runs at a time. By default one, or one for each device.
        devices: GPUs by number, such as [0,1]. Each run gets one of them. By default all GPUs if
            there are several jobs.
        dry_run: Print what there is to do and how long it takes, and exit.
        slurm: Submit the runs as a SLURM array with these parameters of submitit, such as
            {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1, slurm_array_parallelism: 8},
            and exit.
        sweep_file: Write the runs as a W&B sweep to this file, and exit.
        finished: Folders with finished runs of this plan that are kept elsewhere, such as
            docs/studies/cifar10_small. A run of the same name and settings is not trained again.
        options: Options of `fit` for all runs, as after `--`.
    """
    console = Console()
    chosen: dict[str, Any] = {"rows": rows, "sweep": sweep, "configs": configs}
    chosen = {key: split_names(names) for key, names in chosen.items()}
    if isinstance(seeds, int):
        if not 1 <= seeds <= _MAX_SEEDS:
            raise ValueError(f"Expected `--seeds` to be in [1, {_MAX_SEEDS}] but got {seeds}.")
        seeds = list(range(seeds))
    jobs = max(1, len(devices or [])) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"Expected `--jobs` to be >= 1 but got {jobs}.")
    gpus = visible_devices(devices, jobs)
    folder = root.expanduser().resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"Expected `--root` to be a folder but {existing} is a file.")
    common: dict[str, Any] = {"data": data, "seeds": seeds, "options": options or []}
    plan = make_plan(command_line, **chosen, **common, root=folder)
    names = split_names(only)
    unknown = sorted(set(names) - {run.name for run in plan})
    if unknown:
        raise ValueError(
            f"Expected `--only` to name runs of the plan, such as {plan[0].name}, but got "
            f"{', '.join(unknown)}."
        )
    plan = [run for run in plan if run.name in names] if names else plan
    others = split_names(finished)
    plan, not_used = use_kept_runs(plan, others, command_line.all_settings)
    for run in plan:
        if run.folder.parent == folder:
            check_same_study(run, command_line.read_options)
    _check_arguments(plan, command_line)
    if sweep_file is not None:
        choice = {**chosen, "seeds": seeds, "root": [root], "data": split_names(data or "")}
        write_sweep(sweep_file, plan, choice, options or [], console)
        return
    console.print(plan_table(plan, jobs))
    for sentence in not_used:
        print_plain(console, sentence)
    if dry_run:
        return
    if slurm is not None:
        submit(plan, slurm, console)
        return
    pool = Pool(jobs, gpus, console)
    try:
        pool.run(plan)
    except KeyboardInterrupt:
        console.print("Stopped. The same command continues.")
        raise SystemExit(130) from None
    done = sum(state_of(run) is State.FINISHED for run in plan)
    console.print(f"{done} of {counted(len(plan))} finished.")
    for run, reason in pool.failures.items():
        print_plain(console, f"  {run.name}: {reason}\n    {study_file(run, 'log')}")
    if pool.failures:
        raise SystemExit(f"{len(pool.failures)} failed; the same command tries them again.")
    also = [f"--finished={','.join(others)}"] if others else []
    command = shlex.join([*started_as(), "report", str(root), *also])
    print_plain(console, f"Tables and figures: {command}")


def visible_devices(devices: Sequence[int] | None, jobs: int) -> list[str]:
    """Returns the names of GPUs for `CUDA_VISIBLE_DEVICES`, which may hide some already.

    By default these are all GPUs if there are several jobs, and otherwise none, which leaves the
    choice to the run.
    """
    # Only here, so that `study --help` does not wait for it.
    import torch

    gpus = torch.cuda.device_count()
    if devices is None:
        devices = range(gpus) if jobs > 1 else []
    if not all(0 <= device < gpus for device in devices):
        raise ValueError(
            f"Expected `--devices` to number some of this machine's {gpus} GPUs, from 0, but got "
            f"{list(devices)}."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return [names[device].strip() for device in devices]


def plan_table(plan: Sequence[PlannedRun], jobs: int) -> Table:
    """Makes a table of the runs by method and state, with an estimate of the time left."""
    states = {run: state_of(run) for run in plan}
    done = {run: epochs_done(run) if states[run] is State.CUT_OFF else 0 for run in plan}
    done |= {run: run.epochs for run in plan if states[run] is State.FINISHED}
    left = {run: run.epochs - done[run] for run in plan}
    data = ", ".join(sorted({run.data for run in plan}))
    table = Table(title=escape(f"{counted(len(plan))} on {data}"))
    table.add_column("method", no_wrap=True)
    for column in ("runs", *(state.value for state in State), "epochs left"):
        table.add_column(column, justify="right")
    stems = list(dict.fromkeys(run.stem for run in plan))
    for stem in [*stems, "all"]:
        runs = [run for run in plan if stem in (run.stem, "all")]
        own = [states[run] for run in runs]
        counts = [len(runs), *(own.count(state) for state in State), sum(left[r] for r in runs)]
        name = escape(stem.rsplit("-", 1)[0])
        table.add_row(name, *map(str, counts), end_section=stem == stems[-1])
    results = [result for run in plan if (result := results_of(run))]
    # Old runs do not know their time.
    paces = [pace for r in results if math.isfinite(pace := r.wall_time_seconds / r.epochs)]
    table.caption = "The time left is known once a run has finished."
    if paces:
        seconds = round(sum(left.values()) * statistics.median(paces) / jobs)
        table.caption = (
            f"About {timedelta(seconds=seconds)} with {jobs} at a time, at the median time of an "
            "epoch in the finished runs."
        )
    return table


def _check_arguments(plan: Sequence[PlannedRun], command_line: CommandLine) -> None:
    """Raises a `ValueError` if `fit` would refuse the arguments of a run.

    Checked is one run for each file and sweep. If there are many, only the first and the last ones
    are checked, because the user's own files follow the rows of Table 1.
    """
    first: dict[str, PlannedRun] = {}
    for run in plan:
        options = command_line.read_options(run.arguments[1:])
        kind = [o.value if o.name == "config" else o.name for o in options]
        first.setdefault(str(kind), run)
    runs = list(first.values())
    for run in [runs[0], *runs[1:][1 - _CHECKED :]]:
        try:
            command_line.check_arguments(run.arguments)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from None
