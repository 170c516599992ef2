"""What one checkout computes and writes: the process that `compare.py` starts for each.

It uses the command line and the run folder alone, which stay as they are whatever moves inside.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flows import all_flows

import robust_flatness.functional
from robust_flatness.cli import main as command_line

EPOCHS = 2
MEASURES = ("evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping")
LIGHT = [
    "--data.num_train=80",
    "--data.batch_size=32",
    "--model.network.width=8",
    "--model.steps=2",
    *(f"--{name}.num_examples=8" for name in (*MEASURES, "final", "curvature")),
    *(f"--{name}.every_n_epochs=1" for name in MEASURES),
    *("--final.steps=2", "--final.restarts=2", "--final.num_perturbations=2"),
    *("--autoattack.num_examples=4", "--autoattack.version=custom"),
    "--autoattack.attacks=[apgd-ce]",
]
STUDY = ["--landscape.num_examples=8", "--landscape.num_directions=1", "--landscape.num_steps=3"]
TYPED = ["--model.eps=4/255", "--trainer.max_epochs=7"]
# Neither metrics nor settings, which are compared as configurations.
NOT_COMPARED = {"settings", "versions", "hardware", "wall_time_seconds"}


def say(text: str) -> None:
    """Prints progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def run(*arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process and returns its status and what it printed."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            command_line(list(arguments))
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
    return status, out.getvalue(), errors.getvalue()


def must(*arguments: str) -> str:
    """Runs a command that has to end well and returns what it printed."""
    status, out, errors = run(*arguments)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {status}:\n{out}\n{errors}")
    return out


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists by their path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{name}/{index}")
    else:
        yield name, value


def digest(array: torch.Tensor | np.ndarray) -> str:
    """Shape, type and hash of an array's bytes."""
    values = array.detach().cpu().contiguous() if isinstance(array, torch.Tensor) else array
    if isinstance(values, torch.Tensor):
        values = values.view(-1).view(torch.uint8) if values.ndim else values.view(1)
        kind = f"{tuple(array.shape)} {array.dtype}"
        return f"{kind} {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"
    return f"{values.shape} {values.dtype} {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


def run_facts(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """Metrics, arrays and tensors of a run folder, as text by name."""
    yield f"{name}/files", "\n".join(sorted(str(p.relative_to(folder)) for p in files(folder)))
    with (folder / "metrics.csv").open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            yield from ((f"{name}/metrics.csv/{number}/{k}", str(v)) for k, v in row.items())
    for path in sorted(folder.glob("results*.json")):
        content = json.loads(path.read_text())
        kept = {key: value for key, value in content.items() if key not in NOT_COMPARED}
        yield from ((f"{name}/{path.name}{k}", repr(v)) for k, v in flat(kept))
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield from ((f"{name}/{path.name}/{k}", digest(arrays[k])) for k in arrays.files)
    for path in sorted(folder.glob("checkpoints/*.ckpt")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        for key, value in flat(checkpoint):
            if isinstance(value, torch.Tensor):
                yield f"{name}/{path.name}{key}", digest(value)


def files(folder: Path) -> Iterator[Path]:
    """Files in a folder at any depth, hidden ones left out."""
    return (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def trained(presets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Trains presets, tests the first one's checkpoint, and studies two rows at another seed."""
    quiet = ["--without=[wandb]", "--trainer.enable_progress_bar=false"]
    for row in presets:
        say(f"fit {row}")
        length = f"--trainer.max_epochs={EPOCHS}"
        must("fit", f"--config=table1/{row}.yaml", f"--folder=runs/{row}", length, *LIGHT, *quiet)
    for row in presets[:1]:
        say(f"test {row}")
        model = yaml.safe_load(Path(f"runs/{row}/config.yaml").read_text())["model"]["class_path"]
        checkpoint = f"--ckpt_path=runs/{row}/checkpoints/last.ckpt"
        must("test", f"--model={model}", checkpoint, *quiet)
    say("study at, trades")
    length = ["--trainer.max_epochs=1", *STUDY]
    must("study", "--rows=at,trades", "--seeds=[1]", "--root=runs", "--", *length, *LIGHT, *quiet)
    for folder in sorted(path for path in Path("runs").iterdir() if path.is_dir()):
        if (folder / "metrics.csv").is_file():
            yield from run_facts(folder, f"runs/{folder.name}")


def configurations(alone: Sequence[str], paired: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The merged configuration of presets, typed options before and after `--model`.

    Args:
        alone: Rows that are merged with nothing else.
        paired: Rows of which each ordered pair is merged.
    """
    choices = [(row,) for row in alone] + list(itertools.permutations(paired, 2))
    for number, rows in enumerate(choices):
        if number % 20 == 0:
            say(f"configurations: {number} of {len(choices)}")
        files = [f"--config=table1/{row}.yaml" for row in rows]
        model = ["--model", next(filter(None, map(class_of, rows[::-1])), "AT")]
        for data in ("Digits", "CIFAR10"):
            orders = {"before": [*TYPED, *model], "after": [*model, *TYPED]}
            for name, options in orders.items():
                arguments = ["fit", f"--data={data}", *files, *options, "--print_config"]
                status, out, errors = run(*arguments)
                merged = f"configurations/{data}/{'+'.join(rows)}/{name}"
                yield merged, f"{status}\n{out}{errors}"


def class_of(row: str) -> str | None:
    """The model's class that a preset names."""
    configs = Path(next(iter(robust_flatness.__path__))) / "configs"
    content = yaml.safe_load((configs / "table1" / f"{row}.yaml").read_text())
    return (content.get("model") or {}).get("class_path")


def report() -> Iterator[tuple[str, str]]:
    """The table of all runs."""
    say("report")
    must("report", "runs", "--folder=report")
    yield "report/table1.csv", Path("report/table1.csv").read_text()
    yield "report/files", "\n".join(sorted(str(path) for path in files(Path("report"))))


def check_origin() -> None:
    """Raises if any module of the package came from elsewhere, such as an editable install."""
    path = os.environ["PYTHONPATH"]
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if name.startswith("robust_flatness.") and origin and not origin.startswith(path):
            raise RuntimeError(f"Expected {name} to come from {path} but got {origin}.")


def main() -> None:
    """Writes facts and flows; arguments are the job as JSON, and the file."""
    os.nice(10)
    torch.set_num_threads(1)
    for part in ("fabric", "pytorch", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    job, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    say(f"package: {Path(robust_flatness.functional.__file__).resolve().parent.parent}")
    facts = dict(trained(job["presets"]))
    facts |= dict(report())
    facts |= dict(configurations(job["alone"], job["pairs"]))
    flows = dict(all_flows(must, say))
    check_origin()
    text = json.dumps({"facts": facts, "flows": flows})
    # Checkpoints name their folder, which is another one for each checkout.
    file.write_text(text.replace(str(Path.cwd()), "."))


if __name__ == "__main__":
    main()
