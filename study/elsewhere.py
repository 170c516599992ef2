"""The same runs on more than one machine: as a SLURM array, or as a W&B sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from robust_flatness.study.launch import Process, start
from robust_flatness.study.plan import PlannedRun, counted
from robust_flatness.study.state import State, state_of

# Several tasks or nodes would train one run together; that is Lightning's own affair.
_ONE = ("tasks_per_node", "nodes", "slurm_ntasks_per_node", "slurm_nodes")


class Work:
    """Trains one run and waits for it: what a node of the cluster does."""

    def __init__(self) -> None:
        self._process: Process | None = None

    def __call__(self, run: PlannedRun) -> None:
        """Does nothing where another process trains the run, or it has finished.

        Args:
            run: Of a plan.

        Raises:
            RuntimeError: If the run failed, so that the job counts as failed.
        """
        self._process = start(run)
        code = 0 if self._process is None else self._process.wait()
        if code and state_of(run) is not State.FINISHED:
            raise RuntimeError(f"{run.name} ended with code {code}.")

    def checkpoint(self, run: PlannedRun) -> Any:
        """Ends the run at the job's time limit, and asks submitit for one more job of it."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        return DelayedSubmission(Work(), run)

    def __getstate__(self) -> dict[str, Any]:
        return {"_process": None}


def submit(plan: Sequence[PlannedRun], parameters: Mapping[str, Any], console: Console) -> None:
    """Submits what has not finished as one SLURM array, through submitit.

    Args:
        plan: Runs, on a file system that the nodes share.
        parameters: Of submitit's executor; `cluster: local` runs them all at once on this machine.
        console: Where the jobs are told.

    Raises:
        ValueError: If submitit or SLURM is missing, or a parameter is refused.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "Expected submitit to be installed for `--slurm` but it is not: "
            "pip install 'robust-flatness[slurm]'."
        ) from error
    for name in _ONE:
        if parameters.get(name, 1) != 1:
            raise ValueError(
                f"Expected `--slurm` to give a run one task but got {name}: {parameters[name]}; "
                "several GPUs of one node take `-- --trainer.devices=…`."
            )
    left = [run for run in plan if state_of(run) is not State.FINISHED]
    if not left:
        console.print("Nothing is left to submit.")
        return
    settings = dict(parameters)
    folder = left[0].folder.parent / "study" / "slurm"
    try:
        # Left to itself, submitit takes this machine where there is no SLURM.
        executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", "slurm"))
        executor.update_parameters(name="study", **settings)
        jobs = executor.map_array(Work(), left)
    except (NotImplementedError, NameError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `--slurm` to hold parameters of submitit but got {dict(parameters)}: {error}"
        ) from error
    text = f"Submitted {counted(len(jobs))} as {jobs[0].job_id.split('_')[0]}; logs: {folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_sweep(
    path: Path,
    plan: Sequence[PlannedRun],
    asked: Mapping[str, Sequence[Any]],
    options: Sequence[str],
    console: Console,
) -> None:
    """Writes what has not finished as a W&B sweep, whose agents train one run each.

    Args:
        path: The YAML file.
        plan: Runs.
        asked: Arguments of `study` that make the plan.
        options: Of `fit`, for all runs.
        console: Where is told how to start it.

    Raises:
        ValueError: If there is a folder in the file's place.
    """
    if path.is_dir():
        raise ValueError(f"Expected `--sweep_file` to be a file to write but {path} is a folder.")
    same = [f"--{name}={_written(name, values)}" for name, values in asked.items() if values]
    command = ["${env}", "${interpreter}", "${program}", "study", *same, "${args}"]
    left = [run.name for run in plan if state_of(run) is not State.FINISHED]
    content = {
        "program": "cli.py",
        "command": [*command, *(["--", *options] if options else [])],
        "method": "grid",
        "metric": {"name": "final/test/robust_loss", "goal": "minimize"},
        "parameters": {"only": {"values": left}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    text = (
        f"Wrote {counted(len(left))} to {path}. Start it with: wandb sweep {path}\n"
        "Agents try each run once; what is cut off, the same command without --sweep_file finishes."
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _written(name: str, values: Sequence[Any]) -> str:
    text = ",".join(str(value) for value in values)
    return f"[{text}]" if name == "seeds" else text
