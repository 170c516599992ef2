"""What the soak scripts share: a progress line, and a file with the results and their setting."""

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from robust_flatness.run_folder.environment import hardware, versions

FOLDER = Path(__file__).parent / "results"


def progress(number: int, total: int, text: str) -> None:
    """Prints one line for each case."""
    print(f"[{number}/{total}] {text}", file=sys.stderr, flush=True)


def setting() -> str:
    """Date, commit, hardware and versions in one line each."""
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    commit, changed = (
        subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True).stdout.strip()
        for command in commands
    )
    machine, packages = hardware(), versions()
    named = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return (
        f"- Date: {date.today()}\n"
        f"- Commit: {commit or 'none'}{' with local changes' if changed else ''}\n"
        f"- Hardware: {machine['cpu']}, {machine['cpu_cores']} cores\n"
        f"- Versions: {named}\n"
    )


def write_results(
    name: str, title: str, outcomes: Mapping[str, str], details: Sequence[str], failures: set[str]
) -> int:
    """Writes `results/<name>.md` and prints the counts.

    Args:
        name: Of the file.
        title: Its heading.
        outcomes: Outcome of each case by its label.
        details: Lines about single cases.
        failures: Outcomes that are failures.

    Returns:
        The exit status: 1 if any case failed.
    """
    counts = Counter(outcomes.values())
    table = "".join(f"| {outcome} | {count} |\n" for outcome, count in counts.most_common())
    failed = [f"{label}: {outcome}" for label, outcome in outcomes.items() if outcome in failures]
    lines = "".join(f"- {line}\n" for line in details) or "None.\n"
    verdict = (
        f"{len(failed)} of {len(outcomes)} failed" if failed else f"{len(outcomes)}, none failed"
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.md").write_text(
        f"# {title}\n\n{setting()}- Cases: {verdict}\n\n| outcome | cases |\n|---|---|\n{table}\n"
        f"## Cases to look at\n\n{lines}"
    )
    print(f"{verdict}: {dict(counts)}")
    return 1 if failed else 0
