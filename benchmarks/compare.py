"""Whether two checkouts compute the same, byte for byte, on this machine.

    python benchmarks/compare.py ba960bd .          # a revision and a folder; four presets
    python benchmarks/compare.py ba960bd . --all    # all presets, and all pairs of presets

Each checkout runs in a process of its own, on one thread: presets for two epochs with light
measures, `test` on a checkpoint, a small `study`, `report`, and the merged configuration of each
preset and of pairs of presets on Digits and CIFAR-10. Compared are metrics.csv, the metrics of
results.json, arrays, hashes of the tensors in checkpoints, table1.csv and the configurations;
times, versions, hardware and paths are not. The first checkout's facts are cached by its contents.
The status is 1 if anything differs that no `--ignore` pattern names.

It ends with the calls, functions and files of the package that four flows pass through.
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
from pathlib import Path
from typing import Any

PRESETS = ("at_awp", "entropy_sgd", "self_supervision", "weight_averaging")
CHILD = Path(__file__).with_name("checkout_facts.py")
# What the facts depend on besides the package: none of these folders is imported by it.
LEFT_OUT = {"tests", "docs", "benchmarks", "runs", "report", "build", "dist", "wandb"}
SUFFIXES = {".py", ".yaml", ".cfg", ".csv", ".html", ".css", ".js"}
# Facts of a part and characters of a value that are printed.
FACTS, SHOWN = 8, 80


@contextmanager
def checkout(given: str) -> Iterator[Path]:
    """The folder of a checkout; a revision of this repository is unpacked for a while.

    Args:
        given: A folder, or a revision.

    Raises:
        ValueError: If it is neither.
    """
    if (Path(given) / "cli.py").is_file():
        yield Path(given).resolve()
        return
    repository = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", repository, "archive", given], capture_output=True, check=False
        )
        if archive.returncode:
            raise ValueError(f"Expected a checkout's folder or a revision but got {given}.")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder).resolve()


def contents(folder: Path) -> str:
    """A hash of what facts depend on: the package's files, these scripts and the libraries."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in LEFT_OUT for part in inside)
        if not hidden and path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{inside}".encode() + path.read_bytes())
    for script in (CHILD, CHILD.with_name("flows.py")):
        digest.update(script.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "lightning", "numpy")]
    digest.update(f"{versions} {platform.platform()} {platform.node()}".encode())
    return digest.hexdigest()[:24]


def facts_of(folder: Path, job: dict[str, list[str]]) -> dict[str, Any]:
    """Runs a checkout in a process of its own.

    Args:
        folder: The checkout.
        job: Rows of Table 1: `presets` to train, `pairs` of which each ordered pair is merged, and
            `alone`, which are merged with nothing else.

    Returns:
        `facts` (text by name) and `flows` (counts by name).
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Ahead of an editable install, whose finder comes last.
        (Path(scratch) / "path").mkdir()
        (Path(scratch) / "path" / "robust_flatness").symlink_to(folder)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(scratch) / "path"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        command = [sys.executable, str(CHILD), json.dumps(job), "facts.json"]
        subprocess.run(command, cwd=scratch, env=environment, check=True)
        return dict(json.loads((Path(scratch) / "facts.json").read_text()))


def cached_facts(folder: Path, job: dict[str, list[str]], cache: Path) -> dict[str, Any]:
    """The same from the cache, if the same contents were run before."""
    key = hashlib.sha256(f"{contents(folder)} {job}".encode()).hexdigest()[:24]
    file = cache / f"{key}.json"
    if not file.is_file():
        found = facts_of(folder, job)
        cache.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(found))
        file.with_suffix(".part").replace(file)
    return dict(json.loads(file.read_text()))


def differences(
    before: dict[str, str], after: dict[str, str], ignored: Sequence[str]
) -> dict[str, str]:
    r"""What differs, with the first line that does.

    Args:
        before: Facts by name.
        after: Facts of the other checkout.
        ignored: Patterns of names that may differ.

    Example:
        >>> differences({"a": "1", "b": "x\ny"}, {"b": "x\nz", "c": "2"}, ["c"])
        {'a': '1 -> nothing', 'b': 'y -> z'}
    """
    found = {}
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name, "nothing"), after.get(name, "nothing")
        if first == second or any(fnmatch(name, pattern) for pattern in ignored):
            continue
        lines = [*map(str.splitlines, (first, second))]
        length = max(map(len, lines))
        padded = [text + ["nothing"] * (length - len(text)) for text in lines]
        old, new = next((pair for pair in zip(*padded) if pair[0] != pair[1]), ("", "line ends"))
        equal = next((n for n, pair in enumerate(zip(old, new)) if len(set(pair)) > 1), 0)
        cut = max(0, equal - 20)
        found[name] = f"{old[cut:].strip()[:SHOWN]} -> {new[cut:].strip()[:SHOWN]}"
    return found


def part_of(name: str) -> str:
    """The part of the comparison that a fact belongs to, such as `runs/at_awp`."""
    return "/".join(name.split("/")[:2])


def print_differences(found: dict[str, str], facts: dict[str, str]) -> None:
    """Prints how many facts of each part are equal, and the first ones that are not."""
    total, unequal = Counter(map(part_of, facts)), Counter(map(part_of, found))
    for part in sorted(total | unequal):
        verdict = f"{unequal[part]} DIFFER" if unequal[part] else "all equal"
        print(f"{part}: {total[part]} facts, {verdict}")
        for name in [name for name in found if part_of(name) == part][:FACTS]:
            print(f"  {name}: {found[name]}")


def print_flows(before: dict[str, list[int]], after: dict[str, list[int]]) -> None:
    """Prints what each flow passes through, in Markdown."""
    print("\n| flow | calls / functions / files before | after |\n|---|---|---|")
    for name in after:
        print(f"| {name} | {' / '.join(map(str, before.get(name, [])))} ", end="")
        print(f"| {' / '.join(map(str, after[name]))} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares two checkouts; returns 0 if they are equal, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a checkout's folder, or a revision of this repository")
    parser.add_argument("after", help="likewise")
    parser.add_argument("--presets", default=",".join(PRESETS), help="rows of Table 1")
    parser.add_argument("--all", action="store_true", help="all rows, and pairs of all rows")
    parser.add_argument("--pairs", default=None, help="rows to pair, by default the presets")
    parser.add_argument("--ignore", nargs="*", default=[], help="patterns of facts' names")
    default = Path(tempfile.gettempdir()) / "robust-flatness-compare"
    parser.add_argument("--cache", type=Path, default=default, help="folder for facts")
    given = parser.parse_args(arguments)
    with checkout(given.before) as first, checkout(given.after) as second:
        rows = sorted(path.stem for path in (first / "configs" / "table1").glob("*.yaml"))
        presets = rows if given.all else list(filter(None, given.presets.split(",")))
        pairs = presets if given.pairs is None else list(filter(None, given.pairs.split(",")))
        job = {"presets": presets, "pairs": pairs, "alone": rows}
        print(f"before: {first}", flush=True)
        before = cached_facts(first, job, given.cache)
        print(f"after: {second}", flush=True)
        after = facts_of(second, job)
    found = differences(before["facts"], after["facts"], given.ignore)
    print_differences(found, before["facts"] | after["facts"])
    print_flows(before["flows"], after["flows"])
    print(f"\n{len(found)} facts differ" if found else "\nequal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
