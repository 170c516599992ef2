"""Tables of the documentation, from finished runs.

Table 1 on one data set, with what each row costs:

for row in configs/table1/*.yaml; do
  python cli.py fit --config $row --without=[autoattack,wandb]; done
python benchmarks/training.py steps --write runs/costs.json
python benchmarks/results.py table1 runs runs/costs.json

AT against AT-AWP over seeds, as paired differences with 95 % t-intervals:

for seed in 2 3 4 5 6; do for model in AT ATAWP; do
  python cli.py fit --model $model --seed_everything $seed; done; done
python benchmarks/results.py pairs runs --seeds [2,3,4,5,6]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from scipy.stats import ttest_rel

from robust_flatness.run_folder.metrics import metric

COLUMNS = [
    *("test/error", "test/robust_error", "train_eval/robust_error"),
    *("early_stopped/test/robust_error", "test/robust_loss"),
    *("flatness/average/test", "flatness/average/train"),
]
PAIRED = [
    *("test/robust_loss", "train_eval/robust_loss", "test/robust_error", "test/autoattack_error"),
    *("flatness/average/test", "flatness/average/train"),
    *(f"early_stopped/{name}" for name in COLUMNS[1:2] + COLUMNS[4:6]),
]


def read(folder: Path) -> dict[str, Any]:
    """The results of a run."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def value(results: dict[str, Any], name: str) -> float:
    """A metric of the last or the early-stopped weights."""
    weights = "early_stopped" if name.startswith("early_stopped/") else "final"
    return float(results[weights][name.removeprefix("early_stopped/")])


def evidence(results: dict[str, Any], reference: dict[str, Any]) -> str:
    """What the last epoch logs that the reference does not, and the final learning rate."""
    last, other = (each["trajectory"][-1] for each in (results, reference))
    names = [name for name in last if name not in other] + ["train/learning_rate", "train/loss"]
    return ", ".join(f"{name} {last[name]:.4g}" for name in names if name in last)


def print_row(cells: Sequence[str]) -> None:
    """Prints a row in Markdown."""
    print(f"| {' | '.join(cells)} |")


def table1(runs: Path, costs: Path, data: str = "Digits", seed: int = 0) -> None:
    """Prints a row for each preset: metrics, cost of a step, and evidence that its method acted."""
    cost = json.loads(costs.read_text())
    folders = {row: runs / f"{row}-{data}-s{seed}" for row in cost}
    results = {row: read(folder) for row, folder in folders.items() if folder.is_dir()}
    heads = ["row", *(metric(name).title for name in COLUMNS)]
    heads += ["passes a step", "time a step", "wall, s", "evidence"]
    print_row(heads)
    print_row(["---"] * len(heads))
    for row, result in results.items():
        metrics = (metric(name).text(value(result, name), 2) for name in COLUMNS)
        passes = "{forwards:g} / {backwards:g}".format(**cost[row])
        seconds = f"{cost[row]['relative']:.2f}", f"{result['wall_time_seconds']:.0f}"
        print_row([f"`{row}`", *metrics, passes, *seconds, evidence(result, results["at"])])


def pairs(runs: Path, seeds: Sequence[int] = (2, 3, 4, 5, 6)) -> None:
    """Prints means and differences of AT and AT-AWP on Digits."""
    results = [[read(runs / f"{m}-Digits-s{s}") for s in seeds] for m in ("AT", "ATAWP")]
    print_row(["", "AT", "AT-AWP", "AT-AWP − AT, 95 % interval"])
    print_row(["---"] * 4)
    for name in PAIRED:
        at, awp = (np.array([value(run, name) for run in method]) for method in results)
        interval = ttest_rel(awp, at).confidence_interval(0.95)
        scale, unit = (100, " points") if metric(name).is_share else (1, "")
        middle, low, high = (scale * number for number in ((awp - at).mean(), *interval))
        texts = [metric(name).text(float(method.mean()), 2) for method in (at, awp)]
        print_row([metric(name).title, *texts, f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]{unit}"])


if __name__ == "__main__":
    auto_cli([table1, pairs])
