"""AT against AT-AWP over seeds, as paired differences with 95 % t-intervals, from run folders.

for seed in 2 3 4 5 6; do for model in AT ATAWP; do
  python cli.py fit --model $model --seed_everything $seed; done; done
python benchmarks/paired_differences.py runs --seeds 2 3 4 5 6
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

FIGURES = {
    "RLoss, test": ("final", "test/robust_loss"),
    "RLoss, train": ("final", "train_eval/robust_loss"),
    "RErr PGD, test": ("final", "test/robust_error"),
    "RErr AutoAttack, test": ("final", "test/autoattack_error"),
    "average flatness, test": ("final", "flatness/average/test"),
    "average flatness, train": ("final", "flatness/average/train"),
    "RLoss, test, early-stopped": ("early_stopped", "test/robust_loss"),
    "RErr PGD, test, early-stopped": ("early_stopped", "test/robust_error"),
    "flatness, test, early-stopped": ("early_stopped", "flatness/average/test"),
}


def read(runs: Path, method: str, seed: int) -> dict[str, Any]:
    """`results.json` of one run on Digits."""
    results: dict[str, Any] = json.loads(
        (runs / f"{method}-Digits-s{seed}/results.json").read_text()
    )
    return results


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % t-interval."""
    count = len(differences)
    half = t.ppf(0.975, count - 1) * stdev(differences) / count**0.5
    return mean(differences), float(half)


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    arguments = parser.parse_args()
    runs = {
        method: [read(arguments.runs, method, seed) for seed in arguments.seeds]
        for method in ("AT", "ATAWP")
    }
    print("| | AT | AT-AWP | AT-AWP − AT, 95 % interval |")
    print("|---|---|---|---|")
    for label, (weights, name) in FIGURES.items():
        values = {method: [run[weights][name] for run in found] for method, found in runs.items()}
        percent = "RErr" in label
        scale, digits, unit = (100, 1, " %") if percent else (1, 2, "")
        means = [f"{scale * mean(values[method]):.{digits}f}{unit}" for method in ("AT", "ATAWP")]
        pairs = [after - before for before, after in zip(values["AT"], values["ATAWP"])]
        middle, half = interval(pairs)
        low, high = (scale * edge for edge in (middle - half, middle + half))
        print(
            f"| {label} | {means[0]} | {means[1]} | {scale * middle:+.{digits}f} "
            f"[{low:+.{digits}f}, {high:+.{digits}f}]{unit.replace(' %', ' points')} |"
        )
    upturns = [
        min(row["test/robust_loss"] for row in run["trajectory"] if "test/robust_loss" in row)
        for run in runs["AT"]
    ]
    print("\nlowest test RLoss of AT during training, by seed:", [round(v, 2) for v in upturns])
    print(
        "wall time, s:",
        [round(run["wall_time_seconds"]) for found in runs.values() for run in found],
    )


if __name__ == "__main__":
    main()
