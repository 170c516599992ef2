"""Ways to train on a GPU, whose steps are timed."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timed_trainers import quiet_trainer, train_on

from robust_flatness.datamodules import ResidentImages, RobustDataModule
from robust_flatness.lightning_modules import AT, ATAWP
from robust_flatness.networks import ResNet18


class RandomImages(RobustDataModule):
    """Random images of CIFAR-10's size."""

    num_classes, in_channels = 10, 3
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count

    def sources(self) -> tuple[ResidentImages, ResidentImages]:
        """As many as asked for to train on, and 1500 to measure on."""
        return self._random(self.count), self._random(1500)

    def _random(self, count: int) -> ResidentImages:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        return ResidentImages(pixels, torch.randint(10, (count,)))


class StepTimer(Callback):
    """Wall-clock seconds of a step, after some that warm up; waits for the device twice."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.seconds = warm_up, 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts after the steps that warm up."""
        if batch_idx == self.warm_up:
            wait(pl_module.device)
            self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        wait(pl_module.device)
        steps = trainer.num_training_batches - self.warm_up
        self.seconds = (time.perf_counter() - self.started) / steps


class Way:
    """A way to train, which goes on whenever it is called.

    Args:
        module: What is trained.
        given: The command's arguments.
        compiled: Whether the network is compiled.
        settings: Of the trainer.
    """

    def __init__(
        self, module: AT, given: argparse.Namespace, *, compiled: bool = False, **settings: Any
    ) -> None:
        self.module, self.timer = module, StepTimer(given.warm_up)
        if compiled:
            module.network.compile()
        count = given.batch * (given.steps + given.warm_up)
        self.data = RandomImages(count, batch_size=given.batch)
        settings |= {"accelerator": given.device, "callbacks": [self.timer]}
        self.trainer = quiet_trainer(max_epochs=0, **settings)

    def __call__(self) -> float:
        """Wall-clock seconds of a step."""
        train_on(self.trainer, self.module, self.data)
        return self.timer.seconds


def ways(given: argparse.Namespace) -> dict[str, Way]:
    """Ways to train, by name; the first is that without `fast`."""
    network = partial(ResNet18, width=given.width)
    # The schedule would end with the epochs that there are.
    arguments: dict[str, Any] = {"network": network, "lr_scheduler": constant}
    found = {
        "float32": Way(AT(**arguments, fast=False), given),
        "fast": Way(AT(**arguments), given),
        "fast, cudnn benchmark": Way(AT(**arguments), given, benchmark=True),
        "fast, graph": Way(AT(**arguments, fast="graph"), given),
    }
    if given.compile:
        found["fast, compiled"] = Way(AT(**arguments), given, compiled=True)
        graphed = AT(**arguments, fast="graph")
        found["fast, graph, compiled"] = Way(graphed, given, compiled=True)
    found["AT-AWP, fast"] = Way(ATAWP(**arguments), given)
    found["AT-AWP, fast, graph"] = Way(ATAWP(**arguments, fast="graph"), given)
    return found


def constant(optimizer: torch.optim.Optimizer) -> Any:
    """A schedule that changes nothing."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds, and what came of it."""
    wait(device)
    started = time.perf_counter()
    found = run()
    wait(device)
    return time.perf_counter() - started, found
