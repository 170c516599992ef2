"""Trains the same runs on several machines: as a SLURM array, or as a W&B sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from robust_flatness.study.plan import PlannedRun, counted, print_plain
from robust_flatness.study.state import Process, State, start, state_of

# With several tasks or nodes, each task would train the run. Lightning starts such runs itself.
_MUST_BE_ONE = ("tasks_per_node", "nodes", "slurm_ntasks_per_node", "slurm_nodes")


class TrainRun:
    """The job of one run on a node of the cluster."""

    def __init__(self) -> None:
        self._process: Process | None = None

    def __call__(self, run: PlannedRun) -> None:
        """Trains a run, unless another process trains it or it has finished."""
        self._process = start(run)
        code = 0 if self._process is None else self._process.wait()
        if code and state_of(run) is not State.FINISHED:
            # The job counts as failed.
            raise RuntimeError(f"{run.name} ended with code {code}.")

    def checkpoint(self, run: PlannedRun) -> Any:
        """Ends the run at the job's time limit, and returns what submitit submits next."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        return DelayedSubmission(TrainRun(), run)

    def __getstate__(self) -> dict[str, Any]:
        return {"_process": None}


def submit(plan: Sequence[PlannedRun], parameters: Mapping[str, Any], console: Console) -> None:
    """Submits the runs that have not finished as one SLURM array, through submitit.

    The parameters are those of submitit's executor. `cluster: local` runs all jobs at once on this
    machine. The nodes share the file system of the run folders.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "Expected submitit to be installed for `--slurm` but it is not: "
            "pip install 'robust-flatness[slurm]'."
        ) from error
    for name in _MUST_BE_ONE:
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
        # By default, submitit runs jobs on this machine if there is no SLURM.
        executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", "slurm"))
        executor.update_parameters(name="study", **settings)
        jobs = executor.map_array(TrainRun(), left)
    except (NotImplementedError, NameError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `--slurm` to contain parameters of submitit but got {dict(parameters)}: "
            f"{error}"
        ) from error
    array = jobs[0].job_id.split("_")[0]
    print_plain(console, f"Submitted {counted(len(jobs))} as {array}; logs: {folder}")


def write_sweep(
    path: Path,
    plan: Sequence[PlannedRun],
    choice: Mapping[str, Sequence[Any]],
    options: Sequence[str],
    console: Console,
) -> None:
    """Writes the runs that have not finished as a W&B sweep, whose agents train one run each.

    The arguments of `study` in `choice` select the plan, and `options` of `fit` are for all runs.
    """
    if path.is_dir():
        raise ValueError(f"Expected `--sweep_file` to be a file to write but {path} is a folder.")
    texts = {name: ",".join(map(str, values)) for name, values in choice.items() if values}
    texts["seeds"] = f"[{texts['seeds']}]"
    arguments = [f"--{name}={text}" for name, text in texts.items()]
    command = ["${env}", "${interpreter}", "${program}", "study", *arguments, "${args}"]
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
    print_plain(
        console,
        f"Wrote {counted(len(left))} to {path}. Start it with: wandb sweep {path}\n"
        "Agents try each run once. To finish runs that are cut off, run the same command without "
        "--sweep_file.",
    )
