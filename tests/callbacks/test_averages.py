"""BatchNorm statistics that are estimated anew for averaged weights."""

import pytest
import torch
from averaging_runs import (
    NAME,
    Final,
    Recorder,
    Scripted,
    Spy,
    Stranger,
    averaging,
    fit,
    module,
    train,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from networks_for_tests import same, snapshot
from torch import nn
from trainers import ToyData, dataset

from robust_flatness.callbacks import weight_averaging
from robust_flatness.callbacks.weight_averaging import reestimate_batch_norm


class OneNorm(nn.Sequential):
    def __init__(self, *_):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(72, 10))


@pytest.mark.parametrize("measures", [[], [Spy()]])
def test_reestimated_statistics_are_those_of_clean_training_images(tmp_path, measures):
    data, seen = ToyData(), Recorder()
    callback = averaging(batch_norm="reestimate", num_examples=12, batch_size=5)
    stock = ModelCheckpoint(tmp_path, "a")
    callbacks = [callback, *measures, seen, stock]
    _, net = fit(*callbacks, data=data, net=module(network=OneNorm), enable_checkpointing=True)
    found = snapshot(net)
    images = (data.measured.tensors[0][:12] - 0.5) / 0.25
    outputs = nn.functional.conv2d(images, found[NAME], found["network.0.bias"])
    # At most 5 images each, and of one size: three batches of 4.
    batches = outputs.split(4)
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variance = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(found["network.1.running_mean"], mean)
    torch.testing.assert_close(found["network.1.running_var"], variance)
    assert same(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], found)
    for measure in measures:
        assert same(measure.seen[-1], found)
    # Training has its own statistics.
    fit(plain := Recorder(), net=module(network=OneNorm))
    assert same(plain.epochs[-1], seen.epochs[-1])


def test_statistics_are_estimated_once_for_each_state_of_the_average(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        reestimate_batch_norm(*args)

    monkeypatch.setattr(weight_averaging, "reestimate_batch_norm", counted)
    fit(Spy(), averaging(batch_norm="reestimate"), Spy("train"), Final(), Scripted(), epochs=3)
    assert len(calls) == 3


def test_estimates_depend_on_no_global_random_state_and_leave_it_alone():
    found, images = [], torch.rand(12, 5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
        reestimate_batch_norm(network, images, 4)
        assert torch.equal(before, torch.get_rng_state())
        found.append(snapshot(network))
    assert same(*found)


def test_statistics_of_modules_that_take_normalised_images():
    images, labels = dataset(12, seed=4).tensors
    normalised = torch.utils.data.TensorDataset((images - 0.5) / 0.25, labels)
    callback, net = averaging(batch_norm="reestimate", dataset=normalised), Stranger()
    callback.normalization = ([0.5] * 3, [0.25] * 3)
    # Nobody measures or saves: the module is left with new statistics all the same.
    train(net, callback, limit_val_batches=0)
    found = snapshot(net)
    reestimate_batch_norm(net, normalised.tensors[0][:10], 128)
    for name, value in snapshot(net).items():
        torch.testing.assert_close(found[name], value)
