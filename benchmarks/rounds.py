"""What the benchmarks share: variants that take turns, goals, and tables in Markdown."""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from statistics import median

import lightning
import torch

from robust_flatness.run_folder.environment import hardware

Variant = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """CPU seconds of this process, or another clock's, for each variant and round.

    Attributes:
        seconds: By variant, one value a round; ratios are to the first variant.
    """

    seconds: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, variants: Mapping[str, Variant], rounds: int) -> "Rounds":
        """Times variants in turns, see `told`.

        Args:
            variants: What to run, by name.
            rounds: Number of times that each is timed.
        """
        return cls.told(
            {name: partial(_cpu_seconds, run) for name, run in variants.items()}, rounds
        )

    @classmethod
    def told(cls, variants: Mapping[str, Callable[[], float]], rounds: int) -> "Rounds":
        """Runs variants that tell their seconds in turns, after each has run once to warm up.

        Their order is reversed every round, so that a machine that slows down does so for all.

        Args:
            variants: What to run, by name; each returns its seconds.
            rounds: Number of times that each is timed.
        """
        for run in variants.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                seconds[name].append(variants[name]())
        return cls(seconds)

    @property
    def first(self) -> str:
        """The variant that others are compared with."""
        return next(iter(self.seconds))

    def ratios(self, variant: str, against: str | None = None) -> list[float]:
        """Time of a variant relative to another's, `None` for the first's, in each round."""
        others = self.seconds[against or self.first]
        return [mine / theirs for mine, theirs in zip(self.seconds[variant], others)]

    def differences(self, variant: str, per: int = 1) -> list[float]:
        """Seconds above the first variant in each round, divided by `per`."""
        pairs = zip(self.seconds[variant], self.seconds[self.first])
        return [(mine - theirs) / per for mine, theirs in pairs]

    def print_table(
        self,
        title: str,
        unit: str,
        convert: Callable[[float], float] = lambda seconds: seconds,
        *,
        digits: int = 3,
        columns: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Prints one row for each variant.

        Args:
            title: What is compared, on what.
            unit: What `convert` gives.
            convert: Maps seconds to the figure that the table shows.
            digits: Digits behind the point.
            columns: More cells: by heading, by variant.
        """
        more = dict(columns or {})
        heads = ["", f"{unit}, median (min to max)", f"time / {self.first}", *more]
        print(f"\n{title}; {len(self.seconds[self.first])} rounds\n")
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for name, seconds in self.seconds.items():
            shown = spread([convert(value) for value in seconds], digits)
            cells = [name, shown, spread(self.ratios(name), 2)]
            cells += [column.get(name, "–") for column in more.values()]
            print(f"| {' | '.join(cells)} |")


def _cpu_seconds(run: Variant) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@dataclass(frozen=True)
class Goal:
    """A figure that was to be reached by the median of the rounds.

    Attributes:
        figure: Its name.
        values: One a round.
        limit: Where it is met.
        at_most: Whether the limit is an upper one.
    """

    figure: str
    values: Sequence[float]
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the median keeps the limit."""
        found = median(self.values)
        return found <= self.limit if self.at_most else found >= self.limit

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        digits = 2 if self.limit < 100 else 0
        found = spread(self.values, digits)
        return (
            f"{'met' if self.met else 'MISSED'}: {self.figure} {found}, goal {sign} {self.limit:g}"
        )


def print_goals(goals: Iterable[Goal]) -> None:
    """Prints goals, those that were missed first."""
    print()
    for goal in sorted(goals, key=lambda goal: goal.met):
        print(f"- {goal}")


def spread(values: Sequence[float], digits: int) -> str:
    """Median, smallest and largest value."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low} to {high})"


def setting() -> str:
    """Day, processor, threads and versions, for the head of a table."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{date.today()}, {hardware()['cpu']}, {threads}, {versions}"


def benchmark_parser(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, in this process")
    return parser


def begin(given: argparse.Namespace) -> None:
    """Sets threads and seed and prints the setting."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(setting())
