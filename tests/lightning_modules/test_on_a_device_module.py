"""A training step on a device: no value goes to Python, nothing is copied, nothing is float64."""

from functools import partial

import pytest
import torch
from distributed.two_processes import EvalBatchNormProject, training_callbacks
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_device import DEVICE, pretended_device
from trainers import PLAIN, VARIANTS, mixed_loader, quiet_trainer

from robust_flatness.callbacks import WeightAveraging
from robust_flatness.lightning_modules import AT
from robust_flatness.networks import SmallResNet

network = partial(SmallResNet, width=4)


class SecondStep(Callback):
    """What the second step, callbacks and optimizer included, had of the device; it comes last."""

    def __init__(self, device):
        self.device, self.seen = device, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert pl_module.device == next(pl_module.parameters()).device == batch[0].device == DEVICE
        # The first batch is checked, which waits.
        self.device.waits.clear()
        self.device.copies.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen = [*self.device.waits], [*self.device.copies]


def second_step(monkeypatch, build, callbacks=()):
    with pretended_device(monkeypatch, refuses_float64=True) as device:
        watch = SecondStep(device)
        strategy = SingleDeviceStrategy(device=DEVICE)
        trainer = quiet_trainer(strategy=strategy, devices=1, callbacks=[*callbacks, watch])
        trainer.fit(build(), mixed_loader())
    return watch.seen


@pytest.mark.parametrize("cls", VARIANTS)
def test_a_step_of_a_module_neither_waits_nor_copies(cls, monkeypatch):
    assert second_step(monkeypatch, lambda: cls(network, **PLAIN)) == ([], [])


def test_a_step_of_the_training_callbacks_neither_waits_nor_copies(monkeypatch):
    project = partial(EvalBatchNormProject, network=network)
    assert second_step(monkeypatch, project, training_callbacks()) == ([], [])


def test_weight_averaging_does_not_wait_and_copies_its_counter_alone(monkeypatch):
    averaging = WeightAveraging(0.9, reference_steps=None)
    waits, copies = second_step(monkeypatch, lambda: AT(network, **PLAIN), [averaging])
    assert waits == []
    assert len(copies) <= 2


def test_what_the_pretended_device_sees(monkeypatch):
    with pretended_device(monkeypatch, refuses_float64=True) as device:
        on_device = torch.zeros(3, device=DEVICE)
        assert (on_device + 1).device == DEVICE
        assert on_device.cpu().device != DEVICE
        assert (on_device.sum() > 1).item() is False
        assert on_device[on_device > 0].tolist() == []
        assert device.waits == ["item", "__getitem__", "tolist"]
        assert device.copies == ["to host"]
        with pytest.raises(RuntimeError, match="on the same device"):
            on_device + torch.zeros(3)
        with pytest.raises(TypeError, match="no float64"):
            on_device.double()
