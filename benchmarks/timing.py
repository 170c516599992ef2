"""What the benchmarks share: timing in turns, trainers, random images, and research code's PGD."""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
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

torch.set_num_threads(1)
torch.manual_seed(0)
warnings.simplefilter("ignore")
for logger in ("auto-attack", "lightning.pytorch"):
    logging.getLogger(logger).setLevel(logging.ERROR)

Seconds = Callable[[], float]


def cpu_seconds(run: Callable[[], object]) -> Seconds:
    """A variant that is timed from outside, in CPU seconds of this process."""
    timer = Timer("run()", globals={"run": run}, timer=time.process_time, num_threads=1)
    return lambda: timer.blocked_autorange(min_run_time=0.1).median


def compare(
    title: str, columns: Mapping[str, Mapping[str, Seconds]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Times variants in turns, and prints a table and their ratios to the first variant.

    Each variant runs once before it is timed. The order is reversed in every other round. Returns
    the seconds of each round, by column and variant.
    """
    seconds = {column: {name: [] for name in variants} for column, variants in columns.items()}
    for column, variants in columns.items():
        for number in range(rounds + 1):
            for name in list(variants)[:: -1 if number and number % 2 == 0 else 1]:
                value = variants[name]()
                if number:
                    seconds[column][name].append(value)
    print(f"\n{date.today()}, {hardware()['cpu']}, one thread, ", end="")
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {rounds} rounds")
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
            middle, low, high = (f"{f(ratios):.3g}" for f in (median, min, max))
            print(f"{column}: {name} / {reference} {middle} ({low} to {high})")
    return seconds


class StepTimer(Callback):
    """Mean `seconds` of a step in each epoch, without its first `warm_up` steps."""

    def __init__(self, warm_up: int = 1, clock: Callable[[], float] = time.process_time) -> None:
        self.warm_up, self.clock, self.images = warm_up, clock, 0
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if index == self.warm_up:
            self._begin = self.clock()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.images += len(batch[0])
        if trainer.is_last_batch:
            self.seconds.append((self.clock() - self._begin) / (index + 1 - self.warm_up))


class StepCost(StepTimer):
    """Also counts images through the first layer. `last` is the instance of the command line."""

    last: "StepCost"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        StepCost.last, self.passes = self, Counter[str]()
        layer = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d))
        layer.register_forward_hook(lambda m, _, out: self.passes.update(forwards=len(out)))
        layer.register_full_backward_hook(
            lambda m, _, out: self.passes.update(backwards=len(out[0]))
        )


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
        parts = slice(self.count), slice(self.count, None)
        train, test = (ResidentImages(pixels[part], labels[part]) for part in parts)
        return train, test


def textbook_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, step_size: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Adversarial examples and their cross-entropy as in research code (Rice et al., Wu et al.).

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
