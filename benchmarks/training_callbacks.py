"""Digits: clean training, the same module with the training callbacks, and ATAWP; means over seeds.

python benchmarks/training_callbacks.py --seeds=[2,3,4,5,6]
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from scipy.stats import ttest_1samp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_flatness.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    FinalEvaluation,
    evaluate,
)
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import ATAWP, MultiStep
from robust_flatness.lightning_modules.schedules import epochs_of_share
from robust_flatness.networks import Normalize, SmallResNet
from robust_flatness.run_folder.metrics import metric

DROPS = (0.6, 0.9)
NAMES = ("test/error", "test/robust_error", "test/robust_loss", "flatness/average/test")
QUIET = {
    **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    **{"enable_progress_bar": False, "enable_model_summary": False},
}


class NormalizedDigits(Digits):
    """Digits whose batches are normalized, as usual elsewhere."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalizes."""
        images, *others = super().on_after_batch_transfer(batch, dataloader_idx)
        return [Normalize(self.mean, self.std)(images), *others]


class Classifier(LightningModule):
    """Somebody else's module, which knows nothing of attacks."""

    def __init__(self, width: int, epochs: int) -> None:
        super().__init__()
        self.network, self.epochs = SmallResNet(10, 1, width=width), epochs

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalized images."""
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """The optimizer and the drops of the Digits preset."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        milestones = [epochs_of_share(share, self.epochs) for share in DROPS]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)]


def trained(method: str, seed: int, epochs: int, width: int) -> nn.Module:
    """A network in [0, 1] after training."""
    seed_everything(seed, verbose=False)
    if method == "ATAWP":
        data = Digits()
        network, schedule = partial(SmallResNet, width=width), partial(MultiStep, milestones=DROPS)
        linked = {"in_channels": 1, "mean": data.mean, "std": data.std, "eps": data.eps}
        module = ATAWP(network, lr_scheduler=schedule, **linked)
        Trainer(max_epochs=epochs, **QUIET).fit(module, data)
        return module
    normalized, classifier, callbacks = NormalizedDigits(), Classifier(width, epochs), []
    channels = normalized.mean, normalized.std
    if method == "callbacks":
        attack = AdversarialTraining(eps=normalized.eps, normalization=channels)
        callbacks = [attack, AdversarialWeightPerturbation(xi=0.01)]
    Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(classifier, normalized)
    return nn.Sequential(Normalize(*channels), classifier)


def cell(name: str, values: np.ndarray) -> str:
    """Mean and 95 % t-interval."""
    text = metric(name).text
    if len(values) < 2:
        return text(values.mean(), 2)
    low, high = ttest_1samp(values, 0).confidence_interval()
    return f"{text(values.mean(), 2)} [{text(low, 2)}, {text(high, 2)}]"


def main(
    seeds: Sequence[int] = (2, 3, 4, 5, 6),
    epochs: int = 80,
    width: int = 16,
    images: int = 200,
    restarts: int = 5,
) -> None:
    """Prints the table, and the paired difference of the callbacks and ATAWP."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, np.ndarray] = {}
    for method in ("clean", "callbacks", "ATAWP"):
        rows = []
        for seed in seeds:
            final = FinalEvaluation(splits=["test"], num_examples=images, restarts=restarts)
            metrics = evaluate(trained(method, seed, epochs, width), Digits(), [final], **QUIET)
            rows.append([metrics[name] for name in NAMES])
        results[method] = np.array(rows)
    results["callbacks − ATAWP"] = results["callbacks"] - results["ATAWP"]
    print(f"| | {' | '.join(metric(name).title for name in NAMES)} |")
    print("|---" * (len(NAMES) + 1) + "|")
    for method, values in results.items():
        print(f"| {method} | {' | '.join(map(cell, NAMES, values.T))} |")


if __name__ == "__main__":
    auto_cli(main)
