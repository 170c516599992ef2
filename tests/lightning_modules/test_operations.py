"""How many operations a training step dispatches, relative to one of adversarial training."""

from functools import cache, partial

import pytest
from lightning.pytorch import Callback
from operation_counts import Operations
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.lightning_modules import (
    AT,
    ATAWP,
    MART,
    TRADES,
    TRADESAWP,
    ATEntropySGD,
    ATSelfSupervision,
)
from robust_flatness.networks import ResNet18


class CountedStep(Callback):
    """Counts the second step of training, as the first one is checked."""

    def __init__(self):
        self.operations = Operations()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            # As on GPUs, where SGD updates all weights at once.
            trainer.optimizers[0].param_groups[0]["foreach"] = True
            self.operations.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.operations.__exit__(None, None, None)


@cache
def counted(cls, precision="32-true", **kwargs):
    step = CountedStep()
    module = cls(partial(ResNet18, width=4), **{**PLAIN, "steps": 7, **kwargs})
    quiet_trainer(callbacks=[step], precision=precision).fit(module, loader(16))
    return step.operations


# The measured ratios, and 3 % more.
@pytest.mark.parametrize(
    ("cls", "kwargs", "ratio"),
    [
        (ATAWP, {}, 1.138),
        (TRADES, {}, 1.268),
        (TRADESAWP, {"warmup": 0.0}, 1.541),
        (MART, {}, 1.203),
        (ATEntropySGD, {}, 1.496),
        (ATSelfSupervision, {}, 2.034),
        (AT, {"keep": "last"}, 0.868),
        (AT, {"fold_batch_norm": True}, 0.802),
    ],
)
def test_a_step_dispatches_few_operations_beside_at(cls, kwargs, ratio):
    assert counted(cls, **kwargs).total <= 1.03 * ratio * counted(AT).total


def test_a_step_of_at_dispatches_few_operations_beside_convolutions():
    at = counted(AT)
    convolutions = at.counts["convolution"] + at.counts["convolution_backward"]
    # 20 layers, 9 forwards, 7 backwards to the images and one to the weights.
    assert convolutions == 20 * (9 + 8)
    assert at.total <= 1.03 * 4.31 * convolutions


def test_weight_perturbations_cost_at_most_a_fifth_of_a_step_under_autocast_too():
    perturbed, plain = (counted(cls, "bf16-mixed") for cls in (ATAWP, AT))
    assert perturbed.total <= 1.2 * plain.total
