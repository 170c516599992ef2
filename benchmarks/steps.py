"""What a training step of each variant costs relative to plain adversarial training.

python benchmarks/steps.py
python benchmarks/steps.py --write runs/costs.json   # for `benchmarks/table1.py`

The rows are those of Table 1 in `configs/table1`, and the variants of the package that are no row
there. Each is built by the command line on the same data without measures and callbacks; its
trainer then trains on for some epochs in each round. Arguments that this command does not know go
to the package's, say `--model.network.width=32`. Passes are forwards and backwards of the first
layer for each image of a batch, counted with hooks.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.progress import track
from rounds import Rounds, begin, benchmark_parser
from timed_trainers import train_on
from torch import nn
from typing_extensions import override

from robust_flatness import cli
from robust_flatness.callbacks import Results
from robust_flatness.command_line.components import LEAVABLE

ORDER = [
    *("at", "unlabeled", "cyclic", "autoaugment", "at_awp", "label_noise", "weight_clipping"),
    *("trades", "self_supervision", "weight_decay", "entropy_sgd", "mish", "late_multi_step"),
    *("silu", "weight_averaging", "larger_eps", "mart", "gelu", "label_smoothing"),
]
# Warm-up epochs would be without their perturbation.
VARIANTS = {
    "trades_awp": ["--model=TRADESAWP", "--model.warmup=0"],
    "mart_awp": ["--model=MARTAWP", "--model.warmup=0"],
}


class Cost(Callback):
    """Counts images through the first layer, and CPU seconds of training epochs."""

    def __init__(self) -> None:
        self.forwards = self.backwards = self.examples = self.steps = 0
        self.seconds = 0.0
        self._hooks: list[Any] = []

    def count_passes(self, module: nn.Module) -> None:
        """Puts hooks on the first layer."""
        layer = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
        self._hooks = [
            layer.register_forward_hook(self._forward),
            layer.register_full_backward_hook(self._backward),
        ]

    def stop_counting(self) -> None:
        """Takes the hooks away, so that they cost nothing while steps are timed."""
        for hook in self._hooks:
            hook.remove()
        self.passes = self.forwards / self.examples, self.backwards / self.examples

    def _forward(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.forwards += len(output)

    def _backward(self, module: nn.Module, into: Any, out: tuple[torch.Tensor, ...]) -> None:
        self.backwards += len(out[0])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.examples += len(batch[0])
        self.steps += 1

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.process_time()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time() - self._started


class Built(cli.CLI):
    """The command line up to where it would train.

    Attributes:
        built: Trainer, module and datamodule of the last one.
    """

    built: tuple[Trainer, LightningModule, LightningDataModule]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        Built.built = self.trainer, self.model, self.datamodule

    @override
    def _default_callbacks(self) -> list[Callback]:
        # What the row itself is made of stays: averages and clipping are callbacks.
        return [found for found in super()._default_callbacks() if not isinstance(found, Results)]


def built(arguments: Sequence[str]) -> tuple[Trainer, LightningModule, LightningDataModule]:
    """What the command line makes of its arguments."""
    cli.main(arguments, Built)
    return Built.built


class Row:
    """A variant that trains on whenever it is asked to.

    Args:
        name: A row of Table 1, or one of `VARIANTS`.
        data: Name of the data on the command line.
        folder: Where the run may write.
        more: Further arguments of the command line.
    """

    def __init__(self, name: str, data: str, folder: str, more: Sequence[str]) -> None:
        chosen = VARIANTS.get(name, [f"--config=table1/{name}.yaml"])
        quiet = ["enable_progress_bar=false", "enable_checkpointing=false", "logger=false"]
        self.trainer, self.module, self.data = built(
            [
                "fit",
                *chosen,
                f"--data={data}",
                f"--name={name}",
                f"--without=[{','.join(LEAVABLE)}]",
                *(f"--trainer.{setting}" for setting in quiet),
                f"--trainer.default_root_dir={folder}",
                *more,
            ]
        )
        self.cost = Cost()
        self.trainer.callbacks.append(self.cost)
        # Schedules would end with the epochs that there are.
        self.trainer.fit_loop.max_epochs = 0
        self.cost.count_passes(self.module)
        self.train(1)
        self.cost.stop_counting()

    def train(self, epochs: int) -> float:
        """CPU seconds of a step, over some more epochs."""
        self.cost.seconds, self.cost.steps = 0.0, 0
        train_on(self.trainer, self.module, self.data, epochs)
        return self.cost.seconds / self.cost.steps


def costs_of(rows: Mapping[str, Row], found: Rounds) -> dict[str, dict[str, float]]:
    """What `benchmarks/table1.py` reads: passes, seconds of a step, and relative to AT's."""
    costs = {}
    for name, row in rows.items():
        forwards, backwards = row.cost.passes
        costs[name] = {
            "forwards": forwards,
            "backwards": backwards,
            "seconds": median(found.seconds[name]),
            "relative": median(found.ratios(name)),
        }
    return costs


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds all rows, times them in turns, and prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=[*ORDER, *VARIANTS], help="`at` comes first")
    parser.add_argument("--data", default="Digits")
    parser.add_argument("--epochs", type=int, default=2, help="of each row in each round")
    parser.add_argument("--write", type=Path, help="a JSON file for `benchmarks/table1.py`")
    given, more = parser.parse_known_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    begin(given)
    with tempfile.TemporaryDirectory() as folder:
        names = track(given.rows, "building", transient=True)
        rows = {name: Row(name, given.data, folder, more) for name in names}
        tried = {name: partial(row.train, given.epochs) for name, row in rows.items()}
        found = Rounds.told(tried, given.rounds)
    passes = {name: "{:g} / {:g}".format(*row.cost.passes) for name, row in rows.items()}
    title = f"A training step on {given.data}"
    columns = {"forwards / backwards an image": passes}
    found.print_table(title, "CPU ms", lambda seconds: 1000 * seconds, digits=1, columns=columns)
    if given.write:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(json.dumps(costs_of(rows, found), indent=1))


if __name__ == "__main__":
    main()
