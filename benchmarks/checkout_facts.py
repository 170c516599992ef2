"""The facts of one checkout, and the counts of four flows, for `compare.py`.

It uses the command line and the run folder alone, which stay the same while modules move.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback

from robust_flatness import cli

MEASURES = ["evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping"]
# Everything that a run does by default besides training.
SWITCHED_OFF = ["wandb", *MEASURES, "trajectory", "final", "autoattack"]
SWITCHED_OFF += ["best_checkpoint", "last_checkpoint"]
LIGHT = [
    *("--data.num_train=80", "--data.batch_size=32", "--model.network.width=8", "--model.steps=2"),
    *(f"--{name}.num_examples=8" for name in (*MEASURES, "final", "curvature")),
    *(f"--{name}.every_n_epochs=1" for name in MEASURES),
    *("--final.steps=2", "--final.restarts=2", "--final.num_perturbations=2"),
    *("--autoattack.num_examples=4", "--autoattack.version=custom"),
    "--autoattack.attacks=[apgd-ce]",
]
QUIET = ["--without=[wandb]", "--trainer.enable_progress_bar=false"]
STUDY = ["--landscape.num_examples=8", "--landscape.num_directions=1", "--landscape.num_steps=3"]
TYPED = ["--model.eps=4/255", "--trainer.max_epochs=7"]
# Neither metrics nor settings. The settings are compared as configurations.
SKIPPED = {"settings", "versions", "hardware", "wall_time_seconds"}
PROJECTIONS = {"clamp", "clamp_", "clip", "minimum"}
Facts = Iterator[tuple[str, str]]


def say(text: str) -> None:
    """Prints progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def run(*arguments: str) -> tuple[int, str]:
    """Runs a command in this process. Returns its exit status and its output."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.main(list(arguments))
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
    return status, out.getvalue() + errors.getvalue()


def must(*arguments: str) -> None:
    """Runs a command that has to succeed."""
    status, output = run(*arguments)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {status}:\n{output}")


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists by their path."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value


def digest(array: np.ndarray | torch.Tensor) -> str:
    """Shape, type and a hash of an array or tensor."""
    kind = f"{tuple(array.shape)} {array.dtype}"
    if isinstance(array, torch.Tensor):
        # NumPy has no bfloat16.
        array = array.detach().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def file_names(folder: Path) -> str:
    """The files in a folder at any depth, without hidden ones."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return "\n".join(sorted(str(path.relative_to(folder)) for path in paths))


def run_facts(folder: Path, name: str) -> Facts:
    """Metrics, arrays and tensors of a run folder."""
    yield f"{name}/files", file_names(folder)
    with (folder / "metrics.csv").open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            yield from ((f"{name}/metrics.csv/{number}/{k}", str(v)) for k, v in row.items())
    for path in sorted(folder.glob("results*.json")):
        results = json.loads(path.read_text())
        kept = {key: value for key, value in results.items() if key not in SKIPPED}
        yield from ((key, repr(value)) for key, value in leaves(kept, f"{name}/{path.name}"))
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield from ((f"{name}/{path.name}/{key}", digest(arrays[key])) for key in arrays.files)
    for path in sorted(folder.glob("checkpoints/*.ckpt")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        for key, value in leaves(checkpoint, f"{name}/{path.name}"):
            if isinstance(value, torch.Tensor):
                yield key, digest(value)


def trained(presets: Sequence[str]) -> Facts:
    """Trains presets, tests a checkpoint of the first, and studies two rows at another seed."""
    for row in presets:
        say(f"fit {row}")
        length = "--trainer.max_epochs=2"
        must("fit", f"--config=table1/{row}.yaml", f"--folder=runs/{row}", length, *LIGHT, *QUIET)
    for row in presets[:1]:
        say(f"test {row}")
        model = yaml.safe_load(Path(f"runs/{row}/config.yaml").read_text())["model"]["class_path"]
        must("test", f"--model={model}", f"--ckpt_path=runs/{row}/checkpoints/last.ckpt", *QUIET)
    say("study at, trades")
    length = ["--trainer.max_epochs=1", *STUDY]
    must("study", "--rows=at,trades", "--seeds=[1]", "--root=runs", "--", *length, *LIGHT, *QUIET)
    for table in sorted(Path("runs").glob("*/metrics.csv")):
        yield from run_facts(table.parent, str(table.parent))
    say("report")
    must("report", "runs", "--folder=report")
    yield "report/table1.csv", Path("report/table1.csv").read_text()
    yield "report/files", file_names(Path("report"))


def configurations(alone: Sequence[str], paired: Sequence[str]) -> Facts:
    """The merged configurations, with typed options before and after `--model`."""
    folder = Path(cli.__file__).parent / "configs" / "table1"
    models = {
        row: yaml.safe_load((folder / f"{row}.yaml").read_text()).get("model") for row in alone
    }
    choices = [(row,) for row in alone] + list(itertools.permutations(paired, 2))
    say(f"{len(choices)} configurations")
    for rows in choices:
        files = [f"--config=table1/{row}.yaml" for row in rows]
        classes = [(models[row] or {}).get("class_path") for row in reversed(rows)]
        model = ["--model", next(filter(None, classes), "AT")]
        for data in ("Digits", "CIFAR10"):
            for order, typed in {"before": [*TYPED, *model], "after": [*model, *TYPED]}.items():
                status, output = run("fit", f"--data={data}", *files, *typed, "--print_config")
                yield f"configurations/{data}/{'+'.join(rows)}/{order}", f"{status}\n{output}"


class Profile:
    """Counts calls of named functions of the package by `sys.setprofile`."""

    def __init__(self) -> None:
        self.calls, self.seen, self.until_projection = 0, set[CodeType](), False

    def start(self) -> None:
        """Starts from zero."""
        self.package, self.calls, self.seen = os.environ["PYTHONPATH"], 0, set()
        sys.setprofile(self._event)

    def stop(self) -> None:
        """Stops counting."""
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.package):
            return
        # Modules, comprehensions and lambdas are parts of a function.
        if event == "call" and code.co_name[0] != "<":
            self.calls += 1
            self.seen.add(code)
        elif event == "c_call" and self.until_projection:
            inside = f"{os.sep}functional{os.sep}" in code.co_filename
            if inside and getattr(argument, "__name__", "") in PROJECTIONS:
                self.stop()

    @property
    def counts(self) -> list[int]:
        """Calls, functions and files."""
        return [self.calls, len(self.seen), len({code.co_filename for code in self.seen})]


PROFILE = Profile()


class Watch(Callback):
    """Counts from the last call of the hook `begin` to the hook `end`."""

    def __init__(self, begin: str, end: str) -> None:
        for name, act in ((end, PROFILE.stop), (begin, PROFILE.start)):
            setattr(self, name, lambda *args, act=act, **kwargs: act())


def flows() -> Iterator[tuple[str, list[int]]]:
    """The calls, functions and files of the package in four flows."""

    def fit(*options: str, switched_off: Sequence[str] = SWITCHED_OFF) -> None:
        tiny = ["--data.num_train=16", "--data.batch_size=8", "--trainer.max_epochs=1"]
        tiny += ["--model.network.width=8", "--trainer.enable_progress_bar=false"]
        must("fit", *tiny, *options, f"--without=[{','.join(switched_off)}]")

    def watch(begin: str, end: str) -> list[str]:
        name = "--trainer.callbacks"
        return [f"{name}={__name__}.Watch", f"{name}.begin={begin}", f"{name}.end={end}"]

    def counted(command: Callable[[], None]) -> list[int]:
        PROFILE.start()
        command()
        PROFILE.stop()
        return PROFILE.counts

    say("flows")
    step = watch("on_train_batch_start", "on_train_batch_end")
    fit("--model=ATAWP", "--model.steps=2", *step)
    yield "one step of AT-AWP with PGD-2", PROFILE.counts
    light = ["num_examples=8", "num_perturbations=1", "steps=1", "every_n_epochs=1"]
    options = [f"--flatness.{option}" for option in light]
    others = [name for name in SWITCHED_OFF if name != "flatness"]
    fit(*options, *watch("on_train_batch_end", "on_train_end"), switched_off=others)
    yield "flatness at an epoch's end, K = 1, PGD-1", PROFILE.counts
    PROFILE.until_projection = True
    counts = counted(lambda: fit("--model.eps=8/255"))
    yield "`--model.eps 8/255` from argv to the first projection", counts
    PROFILE.until_projection = False
    runs = sorted(path.parent for path in Path("runs").glob("*/results.json"))[:6]
    for folder in runs:
        shutil.copytree(folder, Path("six") / folder.name)
    counts = counted(lambda: must("report", "six", "--folder=report_of_six"))
    yield f"`report` on {len(runs)} runs", counts


def main() -> None:
    """Writes facts and flows. Arguments are the job as JSON, and the file.

    The job has rows of Table 1: `presets` to train, `pairs` of which each ordered pair is merged,
    and `alone`, which are merged with nothing else.
    """
    os.nice(10)
    torch.set_num_threads(1)
    for part in ("fabric", "pytorch", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    job, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    say(f"package: {Path(cli.__file__).resolve().parent}")
    facts = dict(trained(job["presets"])) | dict(configurations(job["alone"], job["pairs"]))
    counts = dict(flows())
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None) or os.environ["PYTHONPATH"]
        if name.startswith("robust_flatness.") and not origin.startswith(os.environ["PYTHONPATH"]):
            raise RuntimeError(f"Expected {name} to be of this checkout but got {origin}.")
    text = json.dumps({"facts": facts, "flows": counts})
    # Checkpoints contain the path of their folder, which is different for each checkout.
    file.write_text(text.replace(str(Path.cwd()), "."))
