"""Weights are within their bound wherever anybody can look."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks_for_tests import same, snapshot, tiny_body
from torch import nn
from trainers import PLAIN, ToyData, quiet_trainer

from robust_flatness.callbacks import RobustEarlyStopping, WeightAveraging, WeightClipping
from robust_flatness.callbacks.measuring import averaged_weights
from robust_flatness.lightning_modules import AT, ATAWP
from robust_flatness.networks import SmallResNet

SCALES = ["network.1.weight", "network.4.weight"]


def resnet(classes, channels):
    return SmallResNet(classes, channels, width=4)


def module(network=resnet, cls=AT):
    torch.manual_seed(0)
    return cls(network=network, **PLAIN)


def fit(*callbacks, net=None, epochs=1, **kwargs):
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **kwargs)
    net = net or module()
    trainer.fit(net, ToyData())
    return trainer, net


def largest(weights, net):
    return max(weights[name].abs().max().item() for name, _ in net.named_parameters())


class Watch(Callback):
    """The largest weight of each kind of moment."""

    def __init__(self):
        self.seen = {}

    def look(self, when, weights, pl_module):
        found = largest(weights, pl_module)
        self.seen.setdefault(when, []).append(found)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look("forward", snapshot(pl_module), pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look("batch", snapshot(pl_module), pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        with averaged_weights(trainer, pl_module):
            self.look("measure", snapshot(pl_module), pl_module)


@pytest.mark.parametrize("cls", [AT, ATAWP])
@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}])
def test_weights_are_clipped_after_each_step(cls, kwargs):
    watch = Watch()
    trainer, net = fit(watch, WeightClipping(0.01), net=module(cls=cls), epochs=2, **kwargs)
    assert set(watch.seen) == {"forward", "batch", "measure"}
    for when, found in watch.seen.items():
        assert max(found) <= 0.01, when
    assert largest(snapshot(net), net) <= 0.01
    entries = torch.cat([parameter.detach().abs().flatten() for parameter in net.parameters()])
    logged = trainer.callback_metrics
    assert logged["weight_clipping/largest_weight"] == entries.max()
    assert logged["weight_clipping/share_clipped"] == (entries == entries.max()).float().mean()
    assert 0 < logged["weight_clipping/share_clipped"] < 1


class ClipBeforeForward(Callback):
    """What the authors do."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.01, 0.01)


def test_training_takes_the_course_of_the_authors_code():
    _, ours = fit(WeightClipping(0.01), epochs=2)
    _, theirs = fit(ClipBeforeForward(), epochs=2)
    assert largest(snapshot(theirs), theirs) > 0.01
    ClipBeforeForward().on_train_batch_start(None, theirs, None, 0)
    assert same(snapshot(ours), snapshot(theirs))


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_clipped_weights_are_within_the_bound(tmp_path, first):
    clipping = WeightClipping(0.01)
    averaging = WeightAveraging(0.7, reference_steps=None)
    order = [clipping, averaging] if first else [averaging, clipping]
    stopping = RobustEarlyStopping(num_examples=4, steps=1)
    watch, saved = Watch(), ModelCheckpoint(tmp_path, "a")
    _, net = fit(watch, *order, stopping, saved, epochs=2, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for weights in (
        stopping.best_weights,
        checkpoint["state_dict"],
        checkpoint["current_model_state"],
        snapshot(net),
    ):
        assert 0.009 < largest(weights, net) <= 0.01
    for when, found in watch.seen.items():
        assert max(found) <= 0.01, when
    assert not same(checkpoint["state_dict"], checkpoint["current_model_state"])


def test_ordinary_scales_must_be_left_out_by_name_or_pattern():
    clipped = module(tiny_body)
    before = snapshot(clipped)
    with pytest.raises(ValueError, match="`leave_out` to name the scales " + ", ".join(SCALES)):
        fit(WeightClipping(), net=clipped)
    assert same(before, snapshot(clipped))
    for leave_out in (SCALES, "network.[14].weight", ["network.1.*", "network.4.weight"]):
        net = module(tiny_body)
        fit(WeightClipping(1e-3, leave_out=leave_out), net=net)
        assert net.network[1].weight.min() > 0.5
        assert net.network[0].weight.abs().max() <= 1e-3
        assert (net.network[1].bias.abs().max() <= 1e-3) == ("network.1.*" not in leave_out)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.LayerNorm([3, 8, 8]),
    ],
)
def test_every_ordinary_scale_is_found(norm):
    body = nn.Sequential(norm, nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ValueError, match="the scales network.0.weight, without"):
        fit(WeightClipping(), net=module(lambda *_: body))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, affine=False), nn.InstanceNorm2d(3), nn.BatchNorm2d(3)]
)
def test_scales_that_are_not_trained_are_no_hindrance(norm):
    body = nn.Sequential(norm.requires_grad_(False), nn.Flatten(), nn.Linear(192, 10))
    fit(WeightClipping(), net=module(lambda *_: body))
    assert norm.weight is None or norm.weight.min() == 1


class Fail(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("failed")


@pytest.mark.parametrize("failing", [True, False])
def test_the_optimizer_is_left_as_it_was(failing):
    net, clipping = module(), WeightClipping()
    trainer = quiet_trainer(callbacks=[clipping, Fail()] if failing else [clipping])
    try:
        trainer.fit(net, ToyData())
    except RuntimeError:
        assert failing
    (optimizer,) = trainer.optimizers
    assert largest(snapshot(net), net) <= 0.005
    optimizer.param_groups[0]["lr"] = 1.0
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert largest(snapshot(net), net) > 0.005


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`w_max` to be >= 0 but got -1"):
        WeightClipping(-1)
    with pytest.raises(ValueError, match="`w_max` to be above 0"):
        WeightClipping(0)
    with pytest.raises(ValueError, match=r"`leave_out` to name parameters .* but got \*.norm9"):
        fit(WeightClipping(leave_out=["*.bias", "*.norm9.weight"]))
    with pytest.raises(ValueError, match="to leave trainable parameters to clip"):
        fit(WeightClipping(leave_out="*"))
