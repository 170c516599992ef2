"""The same runs on more than one machine: as a SLURM array, or as a W&B sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from robust_flatness.study.launch import start
from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.state import State, state_of


def submit(plan: Sequence[PlannedRun], parameters: Mapping[str, Any], console: Console) -> None:
    """Submits what has not finished as one SLURM array, through submitit.

    Args:
        plan: Runs, on a file system that the nodes share.
        parameters: Of submitit's executor; `cluster: local` runs them on this machine.
        console: Where the jobs are told.

    Raises:
        ValueError: If submitit is missing, or refuses a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "Expected submitit to be installed for `--slurm` but it is not: "
            "pip install robust-flatness[slurm]."
        ) from error
    left = [run for run in plan if state_of(run) is not State.FINISHED]
    if not left:
        console.print("Nothing is left to submit.")
        return
    settings = dict(parameters)
    folder = left[0].folder.parent / "study" / "slurm"
    try:
        executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", None))
        executor.update_parameters(name="study", **settings)
        jobs = executor.map_array(work, left)
    except (NotImplementedError, NameError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `--slurm` to hold parameters of submitit but got {dict(parameters)}: {error}"
        ) from error
    console.print(f"Submitted {len(jobs)} runs as {jobs[0].job_id.split('_')[0]}; logs: {folder}")


def work(run: PlannedRun) -> int:
    """Trains one run and waits for it; what a node of the cluster does.

    Args:
        run: Of a plan.

    Returns:
        The exit status; 0 also where another process trains the run.

    Raises:
        RuntimeError: If the run failed, so that the job counts as failed.
    """
    process = start(run)
    code = 0 if process is None else process.wait()
    if code:
        raise RuntimeError(f"{run.name} ended with code {code}.")
    return code


def write_sweep(
    path: Path,
    plan: Sequence[PlannedRun],
    asked: Mapping[str, Sequence[Any]],
    options: Sequence[str],
    console: Console,
) -> None:
    """Writes the runs as a W&B sweep, whose agents train one each, on any machines.

    Args:
        path: The YAML file.
        plan: Runs.
        asked: Arguments of `study` that make the plan.
        options: Of `fit`, for all runs.
        console: Where is told how to start it.
    """
    same = [f"--{name}={_written(name, values)}" for name, values in asked.items() if values]
    command = ["${env}", "${interpreter}", "${program}", "study", *same, "${args}"]
    content = {
        "program": "cli.py",
        "command": [*command, *(["--", *options] if options else [])],
        "method": "grid",
        "metric": {"name": "final/test/robust_loss", "goal": "minimize"},
        "parameters": {"only": {"values": [run.name for run in plan]}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    console.print(f"Wrote {len(plan)} runs to {path}. Start it with: wandb sweep {path}")


def _written(name: str, values: Sequence[Any]) -> str:
    text = ",".join(str(value) for value in values)
    return f"[{text}]" if name == "seeds" else text
