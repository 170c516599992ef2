"""The rows of Table 1 on one data set: the table of what they reached and what they cost.

for row in configs/table1/*.yaml; do
  python cli.py fit --config $row --without=[autoattack,wandb]; done
python benchmarks/steps.py --write runs/costs.json
python benchmarks/table1.py runs runs/costs.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from steps import ORDER

from robust_flatness.command_line.files import CONFIGS


def evidence(row: str, run: Path, results: dict[str, Any]) -> str:
    """What shows that the row's mechanism acted."""
    rows = results["trajectory"]
    last, model = rows[-1], results["settings"]["model"]["init_args"]
    rates = list(dict.fromkeys(f"{r['train/learning_rate']:.3g}" for r in rows))
    norms = [r["awp/relative_norm_max"] for r in rows if "awp/relative_norm_max" in r]
    small = [r["awp/relative_norm_min"] for r in rows if "awp/relative_norm_min" in r]
    texts = {
        "at": lambda: f"rates {', '.join(rates)}",
        "unlabeled": lambda: f"share {last['unlabeled/share']:.3f}",
        "cyclic": lambda: f"rates up to {max(float(r) for r in rates):.3g}, {len(rows)} epochs",
        "at_awp": lambda: f"‖ν‖/‖w‖ {min(small):.6f} to {max(norms):.6f}",
        "label_noise": lambda: f"{100 * mean_of(rows, 'label_noise/changed'):.1f} % changed",
        "weight_clipping": lambda: (
            f"largest weight {last['weight_clipping/largest_weight']:.4f}, "
            f"{100 * last['weight_clipping/share_clipped']:.0f} % at it"
        ),
        "trades": lambda: f"divergence {last['train/divergence']:.3f}",
        "mart": lambda: f"weighted divergence {last['train/weighted_divergence']:.4f}",
        "self_supervision": lambda: f"rotation error {100 * last['train/rotation_error']:.0f} %",
        "weight_decay": lambda: f"‖w‖ {weight_norm(run):.1f}",
        "entropy_sgd": lambda: f"rates {', '.join(rates)}, γ {last['entropy_sgd/pull']:.0e}",
        "late_multi_step": lambda: f"rates {', '.join(rates)}; drops after epochs {drops(rows)}",
        "weight_averaging": lambda: (
            f"‖w̄ - w‖/‖w‖ {mean_of(rows, 'weight_averaging/relative_distance'):.4f}, mean of epochs"
        ),
        "larger_eps": lambda: f"ε × {model['eps_scale']}",
        "label_smoothing": lambda: (
            f"loss {last['train/loss']:.2f} at RLoss {last['train/robust_loss']:.2f}"
        ),
        "autoaugment": lambda: (
            f"`{results['settings']['data']['init_args']['augment']}`, training "
            f"RLoss {last['train/robust_loss']:.2f}"
        ),
    }
    given = texts.get(row, lambda: model["network"]["init_args"]["activation"])()
    return given if row != "at" else f"{given}; ‖w‖ {weight_norm(run):.1f}"


def mean_of(rows: list[dict[str, float]], name: str) -> float:
    """Mean of a figure over the epochs that have it."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values)


def drops(rows: list[dict[str, float]]) -> str:
    """Epochs after which the rate fell."""
    rates = [row["train/learning_rate"] for row in rows]
    return ", ".join(str(i) for i in range(1, len(rates)) if rates[i] < rates[i - 1])


def weight_norm(run: Path) -> float:
    """Norm of all weights of convolutions and linear layers."""
    weights = torch.load(run / "checkpoints/last.ckpt", map_location="cpu")["state_dict"]
    return sum(w.square().sum().item() for w in weights.values() if w.ndim > 1) ** 0.5


def print_table(runs: Path, data: str, seed: int, costs: dict[str, dict[str, float]]) -> None:
    """Prints the table in Markdown, in the paper's order behind AT."""
    heads = (
        "row | clean error | RErr | RErr, train | RErr, early-stopped | RLoss | flatness, test | "
        "flatness, train | passes a step | time a step | wall, s | evidence"
    )
    print(f"| {heads} |")
    print("|" + "---|" * len(heads.split("|")))
    for row in ORDER:
        folder = runs / f"{row}-{data}-s{seed}"
        results = json.loads((folder / "results.json").read_text())
        final, stopped, cost = results["final"], results["early_stopped"], costs[row]
        errors = [
            100 * part[name]
            for part, name in (
                (final, "test/error"),
                (final, "test/robust_error"),
                (final, "train_eval/robust_error"),
                (stopped, "test/robust_error"),
            )
        ]
        flatness = [final[f"flatness/average/{split}"] for split in ("test", "train")]
        cells = [
            f"`{row}`",
            *(f"{error:.1f}" for error in errors),
            f"{final['test/robust_loss']:.2f}",
            *(f"{value:.2f}" for value in flatness),
            f"{cost['forwards']:g} / {cost['backwards']:g}",
            f"{cost['relative']:.2f}",
            f"{results['wall_time_seconds']:.0f}",
            evidence(row, folder, results),
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("costs", type=Path, help="what `benchmarks/steps.py --write` wrote")
    parser.add_argument("--data", default="Digits")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    missing = {path.stem for path in (CONFIGS / "table1").glob("*.yaml")} ^ set(ORDER)
    if missing:
        raise SystemExit(f"Expected the rows of configs/table1 but got a difference: {missing}.")
    print_table(given.runs, given.data, given.seed, json.loads(given.costs.read_text()))


if __name__ == "__main__":
    main()
