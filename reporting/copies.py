"""Runs that are the same training, of which a report shows one."""

import json
import re
from collections.abc import Iterable

from robust_flatness.reporting.runs import LeftOut, Run
from robust_flatness.reporting.settings import exact_text, is_training, set_values

_NUMBER = re.compile(r"(\d+)")


def without_copies(runs: Iterable[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Keeps one of the runs that share method, data, seed and what they were trained with.

    The same seed again is no replica: counted as one, it would narrow the deviation over seeds.
    It stays the run with most figures, of these the one with most images, of these the last by
    the numbers in its name, which is the newest of `at-s0`, `at-s0-2`, `at-s0-10`.

    Args:
        runs: In any order. Runs without a seed all stay.

    Returns:
        The runs that stay, in their order, and those left out.
    """
    runs = list(runs)
    best: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        if run.seed is not None:
            key = _training(run)
            best[key] = max(best[key], run, key=_worth) if key in best else run
    kept: list[Run] = []
    left_out: list[LeftOut] = []
    for run in runs:
        other = run if run.seed is None else best[_training(run)]
        if other is run:
            kept.append(run)
        else:
            left_out.append(LeftOut(run.folder, _reason(run, other)))
    return kept, left_out


def _training(run: Run) -> tuple[str, str, int]:
    trained = {name: exact_text(v) for name, v in set_values(run).items() if is_training(name)}
    return run.method, json.dumps(trained, sort_keys=True), -1 if run.seed is None else run.seed


def _worth(run: Run) -> tuple[int, int, list[tuple[int, str]], str]:
    return *_measured(run), _natural(run.name), str(run.folder)


def _measured(run: Run) -> tuple[int, int]:
    """Figures, and images that they were measured on."""
    figures = len(run.final) + len(run.early_stopped) + len(run.landscapes())
    return figures, sum(run.num_examples.values())


def _natural(name: str) -> list[tuple[int, str]]:
    """`run-10` behind `run-9`, and `run` before both."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _reason(run: Run, other: Run) -> str:
    more = "which measured more" if _measured(other) > _measured(run) else "which comes later"
    # Where runs stood on this machine is nobody's business.
    return f"is the same training as {'/'.join(other.folder.parts[-2:])}, {more}"
