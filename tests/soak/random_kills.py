"""Kills of a training run at random moments, each of which has to resume bit for bit.

    python tests/soak/random_kills.py --count 20

`TMPDIR` is on a file system of its own (`/dev/shm`) if there is one: a checkpoint that is written
there and moved onto the run's would be copied, and a kill could leave a part of it. Kills take
turns between any moment, a moment at which files of checkpoints change, and two kills of one run. A
run without a checkpoint starts again, any other is resumed with `--ckpt_path`. The weights of
`last.ckpt` and metrics.csv must then equal those of a run that was never killed. The results are
written to `results/random_kills.md`; the suite kills three runs, `cli/test_random_kills.py`.
"""

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from soak_results import progress, write_results

KINDS = ("any moment", "a checkpoint's write", "two kills")
ENDED = "after its end"
EPOCHS = 4
MEASURES = ("evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping")
ARGUMENTS = [
    *("fit", "--model=ATAWP", f"--trainer.max_epochs={EPOCHS}", "--trainer.accelerator=cpu"),
    # Checkpoints of some megabytes, so that writing one takes a while.
    *("--data.num_train=20", "--data.batch_size=8", "--model.network.width=32", "--model.steps=1"),
    *("--trainer.enable_progress_bar=false", "--trajectory.figures=false"),
    *(f"--{name}.num_examples=4" for name in (*MEASURES, "final")),
    *(f"--{name}.every_n_epochs=1" for name in MEASURES),
    *("--final.steps=1", "--final.restarts=1", "--final.num_perturbations=1"),
    "--without=[wandb,autoattack]",
]
# Each start is a fork of one process that has the package imported.
CONTEXT = multiprocessing.get_context("forkserver")


def run(arguments: Sequence[str], folder: str, temporary: str) -> None:
    """Runs a command line in a folder, its output in `log.txt` there; for a process of its own."""
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from robust_flatness.cli import main

    torch.set_num_threads(1)
    main(list(arguments))


class Victim:
    """A run that is killed and goes on.

    Args:
        folder: Where it runs, an empty folder.
        temporary: Its `TMPDIR`.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        self.checkpoints = folder / "run" / "checkpoints"
        self.had_checkpoint, self.changes = False, 0

    @property
    def last(self) -> Path:
        """The checkpoint that it resumes from."""
        return self.checkpoints / "last.ckpt"

    def start(self) -> BaseProcess:
        """Starts or resumes it."""
        resumed = self.last.is_file()
        if not resumed:
            shutil.rmtree(self.folder / "run", ignore_errors=True)
        goes_on = ["--ckpt_path=run/checkpoints/last.ckpt"] if resumed else ["--folder=run"]
        arguments = ([*ARGUMENTS, *goes_on], str(self.folder), str(self.temporary))
        process = CONTEXT.Process(target=run, args=arguments)
        process.start()
        return process

    def kill(self, is_moment: Callable[[], bool]) -> str:
        """Starts it, kills it with SIGKILL when the moment has come, and says when that was."""
        process = self.start()
        while process.is_alive() and not is_moment():
            time.sleep(0.0005)
        process.kill()
        process.join()
        self.had_checkpoint |= self.last.is_file()
        rows = self.folder / "run" / "metrics.csv"
        done = max(0, len(rows.read_text().splitlines()) - 1) if rows.is_file() else 0
        return f"after {done} epochs" if process.exitcode == -9 else ENDED

    def finish(self) -> str | None:
        """Lets it end; returns why it did not."""
        if self.had_checkpoint and not self.last.is_file():
            return "the checkpoint is gone"
        process = self.start()
        process.join(timeout=600)
        if process.exitcode != 0:
            process.kill()
            lines = (self.folder / "log.txt").read_text().splitlines()
            return f"status {process.exitcode}: {lines[-1] if lines else ''}"
        return None

    def after_changes(self, count: int, delay: float = 0.0) -> Callable[[], bool]:
        """Becomes true when files of checkpoints have changed some times.

        Args:
            count: How many changes; a file that grows changes several times.
            delay: Seconds to wait then.
        """
        self.changes, before = 0, self._files()

        def changed() -> bool:
            nonlocal before
            now = self._files()
            self.changes += now != before
            before = now
            if self.changes >= count:
                time.sleep(delay)
            return self.changes >= count

        return changed

    def _files(self) -> list[tuple[str, int, int]]:
        found = []
        for folder in (self.checkpoints, self.temporary):
            for path in folder.glob("**/*"):
                try:
                    status = path.stat()
                except OSError:
                    continue
                found.append((path.name, status.st_size, status.st_mtime_ns))
        return sorted(found)


def result(folder: Path) -> tuple[Any, Any]:
    """The tensors of `last.ckpt` by name, and the rows of metrics.csv."""
    import torch

    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=False)
    with (folder / "run/metrics.csv").open() as file:
        return checkpoint["state_dict"], list(csv.DictReader(file))


def difference(folder: Path, uninterrupted: Path) -> str | None:
    """What of a run differs from one that was not interrupted."""
    import torch

    (weights, rows), (expected, expected_rows) = result(folder), result(uninterrupted)
    moved = [name for name in expected if not torch.equal(weights[name], expected[name])]
    if moved:
        return f"other weights: {', '.join(moved[:3])}"
    if rows != expected_rows:
        return f"another metrics.csv: {rows} instead of {expected_rows}"[:300]
    left = [path.name for path in (folder / "run/checkpoints").iterdir()]
    if sorted(left) != ["best.ckpt", "last.ckpt"]:
        return f"files beside the checkpoints: {left}"
    return None


class Kills:
    """A run that is not interrupted, and others that are compared with it.

    Args:
        root: An empty folder.
        temporary: An empty folder for `TMPDIR`.
        seed: Of the moments.
    """

    def __init__(self, root: Path, temporary: Path, seed: int = 0) -> None:
        CONTEXT.set_forkserver_preload(["robust_flatness.cli"])
        self.root, self.temporary, self.draw = root, temporary, random.Random(seed)
        (root / "whole").mkdir()
        whole = Victim(root / "whole", temporary)
        # The first start waits for the imports.
        first = CONTEXT.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
        started = time.monotonic()
        whole.kill(whole.after_changes(sys.maxsize))
        self.seconds, self.changes = time.monotonic() - started, whole.changes
        if not (root / "whole/run/results.json").is_file():
            raise RuntimeError((root / "whole/log.txt").read_text())

    def kill(self, number: int) -> tuple[str, str]:
        """Kills and resumes one run; returns the outcome, and what it is about."""
        kind = KINDS[number % len(KINDS)]
        for attempt in range(9):
            victim = Victim(self.root / f"{number}-{attempt}", self.temporary)
            victim.folder.mkdir()
            whens = []
            for _ in range(2 if kind == "two kills" else 1):
                whens.append(victim.kill(self._moment(victim, kind == "a checkpoint's write")))
            if ENDED in whens:
                # The machine may be faster than when the run was timed, and a resumed run is short.
                self.seconds, self.changes = 0.8 * self.seconds, max(1, int(0.8 * self.changes))
                continue
            failed = victim.finish() or difference(victim.folder, self.root / "whole")
            shutil.rmtree(victim.folder)
            text = f"{kind}, {' and '.join(whens)}"
            return ("failed", f"{text}: {failed}") if failed else (f"equal: {kind}", text)
        return "not killed", "each run had ended"

    def _moment(self, victim: Victim, writes: bool) -> Callable[[], bool]:
        if writes:
            delay = self.draw.choice([0.0, 0.0, 0.001, 0.003])
            return victim.after_changes(self.draw.randint(self.changes // 4, self.changes), delay)
        # Before a quarter of the time arguments are read and nothing is written.
        at = time.monotonic() + self.draw.uniform(0.25, 1.0) * self.seconds
        return lambda: time.monotonic() >= at


def memory_folder() -> str | None:
    """A folder on another file system, for `TMPDIR`."""
    shared = Path("/dev/shm")
    return str(shared) if os.access(shared, os.W_OK) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills many runs and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    outcomes, details = {}, []
    with (
        tempfile.TemporaryDirectory() as root,
        tempfile.TemporaryDirectory(dir=memory_folder()) as temporary,
    ):
        kills = Kills(Path(root), Path(temporary), given.seed)
        print(f"uninterrupted: {kills.seconds:.1f} s, {kills.changes} changes", file=sys.stderr)
        for number in range(given.count):
            outcomes[f"kill {number}"], text = kills.kill(number)
            progress(number + 1, given.count, f"{outcomes[f'kill {number}']} ({text})"[:200])
            if not outcomes[f"kill {number}"].startswith("equal"):
                details.append(f"kill {number}: {text}")
        left = [path.name for path in Path(temporary).rglob("*") if path.suffix == ".ckpt"]
        if left:
            details.append(f"left in TMPDIR: {len(left)} checkpoints")
    where = "a tmpfs" if memory_folder() else "the same file system"
    title = f"Runs killed at random moments, TMPDIR on {where}"
    return write_results("random_kills", title, outcomes, details, {"failed", "not killed"})


if __name__ == "__main__":
    sys.exit(main())
