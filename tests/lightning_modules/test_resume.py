"""Promise 10 for the variants: two epochs, a checkpoint and two more are four, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from networks_for_tests import same, snapshot, tiny_body
from trainers import PLAIN, ToyData, quiet_trainer

from robust_flatness.lightning_modules import (
    AT,
    MARTAWP,
    TRADESAWP,
    ATEntropySGD,
    ATSelfSupervision,
    Cyclic,
    EntropySGD,
)
from robust_flatness.networks import ResNet18


def narrow_resnet(classes, channels):
    return ResNet18(classes, channels, width=2)


def walk(parameters):
    return EntropySGD(parameters, lr=1.0, langevin_steps=3, noise=1e-2, scoping=0.1)


def resnet_with_dropout(classes, channels):
    return ResNet18(classes, channels, width=2, dropout=0.3)


VARIANTS = {
    "dropout": (AT, {"network": resnet_with_dropout}),
    "label noise, cyclic": (
        AT,
        {"label_noise": 0.5, "lr_scheduler": lambda optimizer: Cyclic(optimizer, cycles=2)},
    ),
    "TRADES-AWP": (TRADESAWP, {"warmup": 0.5}),
    "MART-AWP, random": (MARTAWP, {"direction": "random"}),
    "Entropy-SGD": (ATEntropySGD, {"optimizer": walk}),
    "self-supervision": (ATSelfSupervision, {"network": narrow_resnet, "hidden": 8}),
}


def fit(folder, variant, seed, **kwargs):
    """Four epochs; returns weights, optimizer state and what the last epoch logged."""
    cls, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    module = cls(**{"network": tiny_body, **PLAIN, **arguments})
    # A resumed process has drawn other numbers before.
    torch.manual_seed(seed)
    keep = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=2, save_top_k=-1)
    trainer = quiet_trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(module, ToyData(), **kwargs)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return snapshot(module), trainer.optimizers[0].state_dict(), logged


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_variant_goes_on_exactly(variant, tmp_path):
    weights, state, logged = fit(tmp_path / "whole", variant, seed=3)
    checkpoint = tmp_path / "whole" / "epoch=1.ckpt"
    again = fit(tmp_path / "rest", variant, seed=4, ckpt_path=checkpoint)
    assert same(weights, again[0])
    assert logged == again[2]
    assert state["param_groups"] == again[1]["param_groups"]
    for parameter, values in state["state"].items():
        for name, value in values.items():
            other = again[1]["state"][parameter][name]
            assert value is other or torch.equal(torch.as_tensor(value), torch.as_tensor(other))
