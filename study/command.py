"""`python cli.py study`: trains a list of runs, and goes on where it was stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.study.check import check_arguments
from robust_flatness.study.devices import visible_devices
from robust_flatness.study.elsewhere import submit, write_sweep
from robust_flatness.study.estimate import plan_table
from robust_flatness.study.plan import PlannedRun, counted, make_plan
from robust_flatness.study.pool import Failure, Pool
from robust_flatness.study.state import State, book_of, check_same_study, state_of

_MOST_SEEDS = 10_000


def study(
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
    options: list[str] | None = None,
) -> None:
    """Trains rows of Table 1, sweeps or your own configs, times seeds.

    What has finished is skipped, what was cut off goes on from its last checkpoint, and a run that
    fails does not stop the others. Options of `fit` for all runs stand behind `--`, such as
    `python cli.py study --rows all --seeds 3 -- --trainer.max_epochs=20`.

    Args:
        rows: Rows of Table 1: all, or names such as at,at_awp.
        sweep: Sweep files, by path or by name, such as trades,mart.
        configs: Config files, each of them a run.
        data: Class of the data, by default what a file names, else Digits.
        seeds: How many seeds from 0, or which, such as [3,4].
        root: Where the run folders are.
        only: Names of runs in the plan to do alone, such as at-Digits-s0.
        jobs: Runs at once; by default one, or one for each device.
        devices: GPUs by number, such as [0,1]; each run gets one of them. By default all, where
            several runs are at work at once.
        dry_run: Say what there is to do and how long it takes, and end.
        slurm: Submit the runs as a SLURM array with these parameters of submitit, such as
            {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1, slurm_array_parallelism: 8},
            and end.
        sweep_file: Write the runs as a W&B sweep to this file, and end.
        options: Options of `fit` for all runs, as behind `--`.
    """
    console = Console()
    asked = {"rows": _names(rows), "sweep": _names(sweep), "configs": _names(configs)}
    if isinstance(seeds, int):
        check_number("seeds", seeds, low=1, high=_MOST_SEEDS)
    chosen_seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    at_once = max(1, len(devices or [])) if jobs is None else jobs
    check_count("jobs", at_once, low=1)
    gpus = visible_devices(devices, at_once)
    plan = make_plan(
        rows=asked["rows"],
        sweeps=asked["sweep"],
        configs=asked["configs"],
        data=data,
        seeds=chosen_seeds,
        root=_folder(root),
        options=options or [],
    )
    plan = _only(plan, _names(only))
    for run in plan:
        check_same_study(run)
    check_arguments(plan)
    if sweep_file is not None:
        same: dict[str, Sequence[Any]] = {**asked, "seeds": chosen_seeds, "root": [root]}
        same["data"] = _names(data or "")
        write_sweep(sweep_file, plan, same, options or [], console)
        return
    console.print(plan_table(plan, at_once))
    if dry_run:
        return
    if slurm is not None:
        submit(plan, slurm, console)
        return
    pool = Pool(at_once, gpus, console)
    try:
        pool.run(plan)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.")
        raise SystemExit(130) from None
    _tell(console, plan, pool.failures)


def _names(given: list[str] | str) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given
    return [name.strip() for name in names if name.strip()]


def _folder(root: Path) -> Path:
    folder = root.expanduser().resolve()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"Expected `--root` to be a folder but {above} is a file.")
    return folder


def _only(plan: list[PlannedRun], names: Sequence[str]) -> list[PlannedRun]:
    unknown = sorted(set(names) - {run.name for run in plan})
    if unknown:
        raise ValueError(
            f"Expected `--only` to name runs of the plan, such as {plan[0].name}, but got "
            f"{', '.join(unknown)}."
        )
    return [run for run in plan if run.name in names] if names else plan


def _tell(console: Console, plan: Sequence[PlannedRun], failures: Sequence[Failure]) -> None:
    finished = sum(state_of(run) is State.FINISHED for run in plan)
    console.print(f"{finished} of {counted(len(plan))} finished.")
    if not failures:
        return
    for run, reason in failures:
        text = f"  {run.name}: {reason}\n    {book_of(run, 'log')}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(f"{len(failures)} failed; the same command tries them again.")
