"""Malformed options, files, checkpoints, data folders and environments.

    python tests/soak/malformed_inputs.py                # all, in a few minutes
    python tests/soak/malformed_inputs.py --only option

Each has to end with status 2 and one sentence of at most three lines that names what was wrong,
before anything is trained, and leave no run folder and no W&B run; in an unusual environment a run
may also just work. Each case is a fork of one process, with a limit of time. The results are
written to `results/malformed_inputs.md`.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from malformed_files import Case
from malformed_values import all_cases
from soak_results import progress, write_results

LIMIT = 60
LINES = 3
FAILURES = {
    "crashed",
    "accepted",
    "still running",
    "names nothing",
    "too long",
    "leaves files",
    "killed",
}
MEASURES = ("evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping")
# What makes a run short that is accepted in error.
SHORT = [
    *("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--model.network.width=8", "--model.steps=1", "--data.batch_size=16"),
    *(f"--{name}.num_examples=4" for name in (*MEASURES, "final", "autoattack")),
    *("--final.steps=1", "--final.restarts=1", "--final.num_perturbations=1"),
    "--without=[autoattack]",
]
CONTEXT = multiprocessing.get_context("forkserver")


def run(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    """Runs a command line in a folder; for a process of its own."""
    import torch

    from robust_flatness.cli import main

    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **environment}
    torch.set_num_threads(1)
    main(list(arguments))


def arguments_of(case: Case, shared: Path) -> list[str]:
    """The command line of a case, with a short run around what is malformed."""
    typed = [argument.replace("{shared}", str(shared)) for argument in case.arguments]
    names = {argument.split("=")[0] for argument in typed}
    if typed[:1] == ["fit"] and not case.alone:
        images = ["--data.num_train=16"] if not any("--data=" in text for text in typed) else []
        short = [text for text in (*SHORT, *images) if text.split("=")[0] not in names]
        return ["fit", *short, *typed[1:]]
    return typed


def verdict(case: Case, status: int | None, printed: str, left: Sequence[str]) -> str:
    """The outcome of a case.

    Args:
        case: The case.
        status: Its exit status, None if it had to be stopped, negative if a signal ended it.
        printed: What it printed.
        left: Files of runs that it left.
    """
    if status is None:
        return "still running"
    if status < 0:
        return "killed"
    if status == 0:
        return "works" if case.may_work else "accepted"
    if "Traceback (most recent call last)" in printed or status == 1:
        return "crashed"
    lines = [line for line in printed.splitlines() if line.strip() and not is_notice(line)]
    if left:
        return "leaves files"
    if len(lines) > LINES:
        return "too long"
    said = " ".join(lines).lower()
    return "refused" if any(name.lower() in said for name in case.names) else "names nothing"


def is_notice(line: str) -> bool:
    """Whether a line is Lightning's or Python's own notice and no part of the error."""
    notices = r"Seed set to|GPU available|TPU available|.*Tip: |.*Warning|\s+warnings?\.warn|usage:"
    return re.match(notices, line) is not None


def tried(case: Case, shared: Path) -> tuple[str, str]:
    """Runs a case; returns its outcome and the last line that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = case.prepare(Path(folder)) if case.prepare else ()
        before = set(Path(folder).rglob("*"))
        arguments = [*arguments_of(case, shared), *prepared]
        process = CONTEXT.Process(target=run, args=(arguments, folder, case.environment))
        process.start()
        process.join(LIMIT)
        status = process.exitcode
        process.kill()
        process.join()
        log = Path(folder) / "log.txt"
        printed = log.read_text(errors="replace") if log.is_file() else ""
        after = set(Path(folder).rglob("*")) - before - {log}
        left = [str(path.relative_to(folder)) for path in after if path.name != "__pycache__"]
        found = verdict(case, status, printed, left)
    last = next((line for line in printed.splitlines()[::-1] if line.strip()), "")
    return found, last.replace(folder, "").replace(str(shared), "").strip()


def prepared_run(shared: Path) -> None:
    """A run whose checkpoints are spoiled in copies."""
    fixture = Path(__file__).parents[1] / "fixtures" / "run_ba960bd"
    shutil.copytree(fixture, shared / "run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries all cases and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="a category, whose results are printed and not written")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(["robust_flatness.cli"])
    cases = [case for case in all_cases() if given.only in (None, case.category)]
    outcomes, details = {}, []
    with tempfile.TemporaryDirectory() as folder:
        prepared_run(Path(folder))
        for number, case in enumerate(cases):
            found, line = tried(case, Path(folder))
            outcomes[case.label] = found
            progress(number + 1, len(cases), f"{found}: {case.label}: {line}"[:220])
            if found in FAILURES:
                shown = re.sub(r"[^\x20-\x7e]", "?", f"{case.label}: {found}: {line}")
                details.append(f"`{shown[:240]}`")
    if given.only:
        failed = sum(found in FAILURES for found in outcomes.values())
        print(f"{failed} of {len(outcomes)} failed")
        return int(failed > 0)
    title = "Malformed inputs"
    return write_results("malformed_inputs", title, outcomes, details, FAILURES)


if __name__ == "__main__":
    sys.exit(main())
