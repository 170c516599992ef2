"""Compares what two checkouts compute on this machine, byte for byte.

    python benchmarks/compare.py ba960bd .          # a revision and a folder; four presets
    python benchmarks/compare.py ba960bd . --all    # all presets, and all pairs of presets

Each checkout runs in its own process on one thread (`checkout_facts.py`): presets for two epochs
with light measures, `test` on a checkpoint, a small `study`, `report`, and merged configurations
of presets and pairs of presets. Compared are metrics, arrays, hashes of the tensors in checkpoints,
table1.csv and the configurations, but not times, versions, hardware and paths. The facts of the
first checkout are cached by its contents. The exit status is 1 if anything differs that no
`--ignore` pattern names. The last table has the calls, functions and files in four flows.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

PRESETS = "at_awp,entropy_sgd,self_supervision,weight_averaging"
SCRIPT = Path(__file__).with_name("checkout_facts.py")
# The package imports none of these folders, so the facts do not depend on them.
SKIPPED = {"tests", "docs", "benchmarks", "runs", "report", "build", "dist", "wandb"}
SUFFIXES = {".py", ".yaml", ".cfg", ".csv", ".html", ".css", ".js", ".jinja"}


@contextmanager
def checkout(place: str) -> Iterator[Path]:
    """The folder of a checkout, or of a temporary one of a revision of this repository."""
    if (Path(place) / "cli.py").is_file():
        yield Path(place).resolve()
        return
    command = ["git", "-C", Path(__file__).parent.parent, "archive", place]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        raise ValueError(f"Expected a checkout's folder or a revision but got {place}.")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder).resolve()


def contents(folder: Path) -> str:
    """A hash of what the facts depend on: the package, the script, and the libraries."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        skipped = any(part.startswith(".") or part in SKIPPED for part in parts)
        if not skipped and path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{parts}".encode() + path.read_bytes())
    digest.update(SCRIPT.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "lightning", "numpy")]
    digest.update(f"{versions} {platform.platform()} {platform.node()}".encode())
    return digest.hexdigest()


def facts_of(folder: Path, job: dict[str, list[str]]) -> dict[str, Any]:
    """Runs a checkout in its own process. The job and the result are those of that script."""
    with tempfile.TemporaryDirectory() as scratch:
        # Before an editable install, whose finder comes last.
        path = Path(scratch, "path")
        path.mkdir()
        (path / "robust_flatness").symlink_to(folder)
        environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        start = (
            f"import sys; sys.path.append({str(SCRIPT.parent)!r}); import {SCRIPT.stem} as script"
        )
        command = [sys.executable, "-c", f"{start}; script.main()", json.dumps(job), "facts.json"]
        subprocess.run(command, cwd=scratch, env={**os.environ, **environment}, check=True)
        return dict(json.loads(Path(scratch, "facts.json").read_text()))


def cached_facts(folder: Path, job: dict[str, list[str]], cache: Path) -> dict[str, Any]:
    """The same, from the cache if a checkout with the same contents did the same job before."""
    key = hashlib.sha256(f"{contents(folder)} {job}".encode()).hexdigest()[:24]
    file = cache / f"{key}.json"
    if not file.is_file():
        facts = facts_of(folder, job)
        cache.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(facts))
        file.with_suffix(".part").replace(file)
    return dict(json.loads(file.read_text()))


def differences(
    before: dict[str, str], after: dict[str, str], ignored: Sequence[str]
) -> dict[str, str]:
    """The facts that differ, each with the first line that differs."""
    differing = {}
    for name in sorted(before.keys() | after.keys()):
        both = before.get(name, "nothing"), after.get(name, "nothing")
        if both[0] == both[1] or any(fnmatch(name, pattern) for pattern in ignored):
            continue
        lines = zip_longest(*(text.splitlines() for text in both), fillvalue="nothing")
        line = next((pair for pair in lines if pair[0] != pair[1]), ("", "line ends"))
        equal = next((n for n, pair in enumerate(zip(*line)) if pair[0] != pair[1]), 0)
        differing[name] = " -> ".join(text[max(0, equal - 20) :].strip()[:80] for text in line)
    return differing


def print_results(before: dict[str, Any], after: dict[str, Any], differing: dict[str, str]) -> None:
    """Prints the number of equal facts of each part, the first that differ, and the flows."""

    def part(name: str) -> str:
        return "/".join(name.split("/")[:2])

    for name, count in sorted(Counter(map(part, before["facts"] | after["facts"])).items()):
        lines = [f"  {fact}: {line}\n" for fact, line in differing.items() if part(fact) == name]
        print(f"{name}: {count} facts, {f'{len(lines)} DIFFER' if lines else 'all equal'}")
        print("".join(lines[:8]), end="")
    print("\n| flow | calls / functions / files before | after |\n|---|---|---|")
    for name in after["flows"]:
        counts = [" / ".join(map(str, side["flows"].get(name, []))) for side in (before, after)]
        print(f"| {name} | {counts[0]} | {counts[1]} |")
    print(f"\n{len(differing)} facts differ" if differing else "\nequal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares two checkouts. Returns 0 if they are equal, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", help="a checkout's folder, or a revision of this repository")
    parser.add_argument("after", help="a checkout's folder, or a revision of this repository")
    parser.add_argument("--presets", default=PRESETS, help="rows of Table 1")
    parser.add_argument("--all", action="store_true", help="all rows, and pairs of all rows")
    parser.add_argument("--pairs", help="rows to pair, by default the presets")
    parser.add_argument("--ignore", nargs="*", default=[], help="patterns of facts' names")
    options = parser.parse_args(arguments)
    with checkout(options.before) as first, checkout(options.after) as second:
        rows = sorted(path.stem for path in (first / "configs" / "table1").glob("*.yaml"))
        presets = rows if options.all else list(filter(None, options.presets.split(",")))
        pairs = presets if options.pairs is None else list(filter(None, options.pairs.split(",")))
        job = {"presets": presets, "pairs": pairs, "alone": rows}
        print(f"before: {first}", flush=True)
        before = cached_facts(first, job, Path(tempfile.gettempdir(), "robust-flatness-compare"))
        print(f"after: {second}", flush=True)
        after = facts_of(second, job)
    differing = differences(before["facts"], after["facts"], options.ignore)
    print_results(before, after, differing)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
