"""What a second process brings: training, flatness and AutoAttack on 1 and 2 gloo processes.

python benchmarks/scaling.py

Each process has one thread and a core to itself. Wall-clock seconds are those inside the trainer;
starting the processes, a few seconds once a run, is not in them. The script calls itself: Lightning
starts the second process, as it does for `--trainer.strategy ddp`.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_ways import RandomImages
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.progress import track
from rounds import Rounds, benchmark_parser, setting
from timed_trainers import quiet_trainer

from robust_flatness.callbacks import AutoAttack, Flatness
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT
from robust_flatness.networks import ResNet18, SmallResNet


class Clock(Callback):
    """Wall-clock seconds between two hooks, on rank 0; every process waits for the others."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        trainer.strategy.barrier()
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        trainer.strategy.barrier()
        self.seconds = time.perf_counter() - self.started

    on_test_epoch_start = on_train_epoch_start
    on_test_epoch_end = on_train_epoch_end


def trainer_of(devices: int, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """A trainer on so many processes."""
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    settings |= {"devices": devices, "strategy": strategy, "callbacks": list(callbacks)}
    return quiet_trainer(**settings)


def seconds_of(given: argparse.Namespace) -> dict[str, float]:
    """Trains and measures, each timed."""
    torch.set_num_threads(1)
    found = {}
    torch.manual_seed(0)
    clock = Clock()
    module = AT(partial(ResNet18, width=given.width))
    data = RandomImages(given.images, batch_size=given.batch)
    trainer_of(given.devices, [clock], max_epochs=2).fit(module, datamodule=data)
    found[f"an epoch of AT, {given.images} images, ResNet-18 of width {given.width}"] = (
        clock.seconds
    )
    digits = AT(SmallResNet, in_channels=1, mean=[0.3], std=[0.4], eps=0.2)
    trainer_of(given.devices, [], max_epochs=given.epochs).fit(digits, datamodule=Digits())
    measures: dict[str, Callback] = {
        "flatness, 384 digits, 10 directions, PGD-20": Flatness(num_examples=384, steps=20),
        f"AutoAttack, {given.attacked} digits in chunks of {given.attacked // 4}": AutoAttack(
            num_examples=given.attacked, chunk_size=given.attacked // 4
        ),
    }
    for name, measure in measures.items():
        trainer = trainer_of(given.devices, [measure, clock])
        trainer.test(digits, Digits(), verbose=False)
        found[name] = clock.seconds
    return found


def told(given: argparse.Namespace, more: Sequence[str], devices: int) -> dict[str, float]:
    """What a run of this script on so many processes found."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, __file__, *more, f"--devices={devices}", f"--file={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(file.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, or one of its processes."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="of ResNet-18")
    parser.add_argument("--epochs", type=int, default=20, help="of AT on Digits before measures")
    parser.add_argument("--attacked", type=int, default=80, help="digits for AutoAttack")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if given.devices:
        found = seconds_of(given)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            given.file.write_text(json.dumps(found))
        return
    torch.set_num_threads(1)
    print(setting())
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in track(range(given.rounds), "rounds", transient=True):
        for devices in (1, 2) if number % 2 == 0 else (2, 1):
            for name, value in told(given, arguments, devices).items():
                by_name = seconds.setdefault(name, {"1 process": [], "2 processes": []})
                by_name["1 process" if devices == 1 else "2 processes"].append(value)
    for name, values in seconds.items():
        Rounds(values).print_table(name, "wall-clock s", digits=2)


if __name__ == "__main__":
    main()
