"""What the benchmarks share: timing in turns, trainers, random images, and research code's PGD.

One thread, unless `OMP_NUM_THREADS` says otherwise.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Compare, Measurement, Timer
from torch.utils.benchmark.utils.common import TaskSpec
from typing_extensions import override

from robust_flatness.datamodules import ResidentImages, RobustDataModule
from robust_flatness.run_folder.environment import hardware

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
torch.manual_seed(0)
warnings.simplefilter("ignore")
for logger in ("auto-attack", "lightning.pytorch"):
    logging.getLogger(logger).setLevel(logging.ERROR)

Seconds = Callable[[], float]
"""Runs a variant and returns its seconds."""


def cpu_seconds(run: Callable[[], object]) -> Seconds:
    """A variant that is timed from outside, in CPU seconds of this process."""
    threads = torch.get_num_threads()
    timer = Timer("run()", globals={"run": run}, timer=time.process_time, num_threads=threads)
    return lambda: timer.blocked_autorange(min_run_time=0.1).median


def compare(
    title: str, columns: Mapping[str, Mapping[str, Seconds]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Times variants in turns, and prints a table and their ratios to the first variant.

    Each variant runs once before it is timed. The order is reversed in every other round, so that
    a machine that slows down does so for all variants. Returns the seconds of each round, by
    column and variant.
    """
    seconds = {column: {name: [] for name in variants} for column, variants in columns.items()}
    for column, variants in columns.items():
        for number in range(-1, rounds):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                value = variants[name]()
                if number >= 0:
                    seconds[column][name].append(value)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    threads = f"{torch.get_num_threads()} threads, {rounds} rounds"
    print(f"\n{date.today()}, {hardware()['cpu']}, {threads}, {versions}")
    table = [
        Measurement(1, values, TaskSpec("", "", "", title, name, column, num_threads=1))
        for column, variants in seconds.items()
        for name, values in variants.items()
    ]
    Compare(table).print()
    for column, variants in seconds.items():
        reference, *others = variants
        for name in others:
            ratios = [a / b for a, b in zip(variants[name], variants[reference])]
            print(f"{column}: {name} / {reference} {spread(ratios)}")
    return seconds


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest value."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


class StepTimer(Callback):
    """Mean `seconds` of a step in each epoch, without its first `warm_up` steps."""

    def __init__(self, warm_up: int = 1, clock: Callable[[], float] = time.process_time) -> None:
        self.warm_up, self.clock = warm_up, clock
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, index: int
    ) -> None:
        if index == self.warm_up:
            self._begin = self.clock()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.is_last_batch:
            self.seconds.append((self.clock() - self._begin) / (index + 1 - self.warm_up))


class StepCost(StepTimer):
    """Also counts images through the first layer. `last` is the instance of the command line."""

    last: "StepCost"

    def __init__(self) -> None:
        super().__init__()
        StepCost.last, self.forwards, self.backwards, self.images = self, 0, 0, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layer = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d))
        layer.register_forward_hook(self._forward)
        layer.register_full_backward_hook(self._backward)

    def _forward(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.forwards += len(output)

    def _backward(self, layer: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.backwards += len(grad_output[0])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, index)
        self.images += len(batch[0])


def quiet_trainer(**settings: Any) -> Trainer:
    """A trainer on one CPU that writes and shows nothing, unless the settings say so."""
    names = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, **dict.fromkeys(names, False), **settings}
    )


def train_on(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Trains one more epoch."""
    trainer.fit_loop.max_epochs += 1  # type: ignore[operator]
    kind = "datamodule" if isinstance(data, LightningDataModule) else "train_dataloaders"
    trainer.fit(module, **{kind: data})


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, 32, 32)` in [0, 1] and labels of ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


class RandomImages(RobustDataModule):
    """Random images of CIFAR-10's size: `count` to train on, and 1500 to measure on."""

    num_classes, in_channels = 10, 3
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count

    @override
    def sources(self) -> tuple[ResidentImages, ResidentImages]:
        images, labels = random_images(self.count + 1500)
        pixels = (255 * images).to(torch.uint8)
        train, test = slice(self.count), slice(self.count, None)
        return ResidentImages(pixels[train], labels[train]), ResidentImages(
            pixels[test], labels[test]
        )


def textbook_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, step_size: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Adversarial examples as in research code, and their cross-entropy `(N,)`.

    These are `steps + 1` forwards and `steps` full backwards (Rice et al., 2020; Wu et al., 2020):
    `loss.backward()` also computes gradients of the weights, which nobody uses.
    """
    delta = torch.empty_like(images).uniform_(-eps, eps)
    delta = ((images + delta).clamp(0, 1) - images).requires_grad_()
    for _ in range(steps):
        cross_entropy(model(images + delta), labels).backward()
        assert delta.grad is not None
        with torch.no_grad():
            moved = (delta + step_size * delta.grad.sign()).clamp(-eps, eps)
            delta.copy_((images + moved).clamp(0, 1) - images)
        delta.grad.zero_()
    adversarial = (images + delta).detach()
    return adversarial, cross_entropy(model(adversarial), labels, reduction="none").detach()
