"""The rows of Table 1 on one data set, from finished runs: metrics, and what each row costs.

for row in configs/table1/*.yaml; do
  python cli.py fit --config $row --without=[autoattack,wandb]; done
python benchmarks/training.py steps --write runs/costs.json
python benchmarks/table1.py runs runs/costs.json
"""

import json
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from robust_flatness.run_folder.metrics import metric

COLUMNS = [
    *("test/error", "test/robust_error", "train_eval/robust_error"),
    *("early_stopped/test/robust_error", "test/robust_loss"),
    *("flatness/average/test", "flatness/average/train"),
]


def cell(results: dict[str, Any], name: str) -> str:
    """A metric of the last or the early-stopped weights."""
    stopped = name.startswith("early_stopped/")
    values = results["early_stopped" if stopped else "final"]
    return metric(name).text(values[name.removeprefix("early_stopped/")], 2)


def evidence(results: dict[str, Any], reference: dict[str, Any]) -> str:
    """What shows that the method acted: metrics that AT does not log, rate and loss at the end."""
    last, other = (each["trajectory"][-1] for each in (results, reference))
    names = [name for name in last if name not in other] + ["train/learning_rate", "train/loss"]
    return ", ".join(f"{name} {last[name]:.4g}" for name in names if name in last)


def main(runs: Path, costs: Path, data: str = "Digits", seed: int = 0) -> None:
    """Prints a row for each preset whose run has finished."""
    cost = json.loads(costs.read_text())
    paths = {row: runs / f"{row}-{data}-s{seed}" / "results.json" for row in cost}
    results = {row: json.loads(path.read_text()) for row, path in paths.items() if path.is_file()}
    heads = [metric(name).title for name in COLUMNS]
    print(f"| row | {' | '.join(heads)} | passes a step | time a step | wall, s | evidence |")
    print("|---" * (len(heads) + 5) + "|")
    for row, result in results.items():
        cells = [f"`{row}`", *(cell(result, name) for name in COLUMNS)]
        cells += ["{forwards:g} / {backwards:g}".format(**cost[row])]
        cells += [f"{cost[row]['relative']:.2f}", f"{result['wall_time_seconds']:.0f}"]
        print(f"| {' | '.join(cells)} | {evidence(result, results['at'])} |")


if __name__ == "__main__":
    auto_cli(main)
