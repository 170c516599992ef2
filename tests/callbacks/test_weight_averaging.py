"""Averages of weights: how they move, and how they are saved, resumed and tested."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from averaging_runs import (
    NAME,
    Final,
    Recorder,
    Scripted,
    Spy,
    Stranger,
    average_of,
    averaging,
    fit,
    module,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks_for_tests import same, snapshot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainers import ToyData, dataset, quiet_trainer

from robust_flatness.callbacks import WeightAveraging
from robust_flatness.callbacks.weight_averaging import scaled_decay
from robust_flatness.lightning_modules import ATAWP

BATCH_NORM = pytest.mark.parametrize("batch_norm", ["average", "reestimate"])


def test_closed_form_after_three_steps():
    seen, callback = Recorder(), averaging(0.9)
    _, net = fit(seen, callback, data=ToyData(24, double=True), net=module().double())
    first, second, third = seen.batches
    for name, average in average_of(callback).items():
        if average.is_floating_point():
            expected = 0.81 * first[name] + 0.09 * second[name] + 0.1 * third[name]
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-15)
        else:
            assert torch.equal(average, third[name])
    assert same(snapshot(net), average_of(callback))
    # Averaging what is constant gives the constant, bit for bit.
    assert torch.equal(average_of(callback)["normalize.std"], first["normalize.std"])


class Counter(Callback):
    def __init__(self, callback):
        self.callback, self.counts = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(int(self.callback._average_model.n_averaged))


def test_one_update_for_each_optimizer_step_also_in_a_second_fit():
    callback = averaging()
    counter = Counter(callback)
    trainer, net = fit(callback, counter, epochs=2, accumulate_grad_batches=2)
    assert counter.counts == [0, 1, 1, 2, 2, 3, 3, 4]
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(net, ToyData())
    assert counter.counts[8:] == [0, 1, 1, 2, 2, 3, 3, 4]


def test_the_horizon_is_a_share_of_training():
    assert scaled_decay(0.9975, 58_650, 58_650) == 0.9975
    callback = WeightAveraging(0.9, reference_steps=6)
    fit(callback, epochs=3)
    assert callback.effective_decay == pytest.approx(1 - 0.1 * 6 / 12)
    fit(callback, epochs=3, accumulate_grad_batches=2)
    assert callback.effective_decay == pytest.approx(1 - 0.1 * 6 / 6)
    # A horizon below one step: the average is the last weights.
    seen = Recorder()
    _, net = fit(seen, WeightAveraging(0.5, reference_steps=100))
    assert same(snapshot(net), seen.batches[-1])


@BATCH_NORM
def test_averages_have_storage_of_their_own(batch_norm):
    callback = averaging(batch_norm=batch_norm)
    _, net = fit(callback, Spy())
    average = callback._average_model.module
    tensors = [[*m.parameters(), *m.buffers()] for m in (average, net)]
    first, second = ({tensor.data_ptr() for tensor in part} for part in tensors)
    assert len(first) == len(tensors[0])
    assert not first & second


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows.append(dict(trainer.callback_metrics))

    on_train_end = on_train_epoch_start


@BATCH_NORM
def test_two_epochs_and_two_more_are_four(tmp_path, batch_norm):
    def run(path, ckpt_path=None):
        callback = WeightAveraging(0.9, reference_steps=8, batch_norm=batch_norm, num_examples=9)
        save = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
        callbacks = [save, Spy(), callback, Scripted(), rows := Rows()]
        net = module(ATAWP)
        fit(*callbacks, epochs=4, net=net, ckpt_path=ckpt_path, enable_checkpointing=True)
        end = torch.load(path / "epoch=3.ckpt", weights_only=True)
        return end, rows.rows, callback.effective_decay, snapshot(net)

    end, rows, decay, net = run(tmp_path / "whole")
    again, more, other, second = run(tmp_path / "again", tmp_path / "whole" / "epoch=1.ckpt")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert same(end[key], again[key])
    assert same(net, second)
    assert same(net, end["state_dict"])
    assert decay == other == pytest.approx(1 - 0.1 * 8 / 16)
    assert "weight_averaging/relative_distance" in rows[-1]
    assert rows[3:] == more[1:]


@BATCH_NORM
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_resumed_has_the_same_figures_and_weights(tmp_path, batch_norm, epochs):
    path, seen, weights = tmp_path / "last.ckpt", [], []
    for resumed in (None, path):
        final, callback = Final(), averaging(batch_norm=batch_norm)
        callbacks = [final, Scripted(), callback, ModelCheckpoint(tmp_path, "last")]
        _, net = fit(*callbacks, epochs=epochs, ckpt_path=resumed, enable_checkpointing=True)
        assert len(final.seen) == epochs
        seen.append(final.final_results)
        weights.append(snapshot(net))
    assert (seen[0]["final"] == seen[0]["early_stopped"]) == (epochs == 1)
    assert seen[0] == seen[1]
    assert same(weights[0], weights[1])
    assert same(weights[0], torch.load(path, weights_only=True)["state_dict"])


def test_checkpoints_after_training_let_it_go_on(tmp_path):
    seen = Recorder()
    trainer, net = fit(averaging(), seen)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(saved["current_model_state"], seen.epochs[-1])
    assert same(saved["state_dict"], snapshot(net))


def test_tests_measure_the_checkpoint_without_warnings(tmp_path):
    final, callback, saved = Final(), averaging(), tmp_path / "a.ckpt"
    trainer, net = fit(final, callback, epochs=2)
    trainer.save_checkpoint(saved)
    averages = snapshot(net)
    for tester in (trainer, quiet_trainer(callbacks=[final, averaging()])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tester.test(module(), ToyData(), ckpt_path=saved, weights_only=True, verbose=False)
        assert not [w for w in said if "verag" in str(w.message) or "current" in str(w.message)]
        assert same(final.seen[-1], averages)


def test_a_trainer_of_doubles_averages_doubles():
    callback = averaging()
    fit(callback, data=ToyData(double=True), precision="64-true")
    assert average_of(callback)[NAME].dtype == torch.float64


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay": 1.5}, r"`decay` to be in \[0, 1\] but got 1.5"),
        ({"decay": 1}, "`decay` to be below 1"),
        ({"reference_steps": 0}, "`reference_steps` to be >= 1 but got 0"),
        ({"num_examples": 0}, "`num_examples` to be >= 1 but got 0"),
        ({"batch_norm": "copy"}, "`batch_norm` to be one of average, reestimate but got copy"),
        ({"split": "all"}, "`split` to be one of train, val, test but got all"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        WeightAveraging(**kwargs)


def test_what_cannot_be_averaged_is_refused_before_training(tmp_path):
    net = Stranger()
    initial = snapshot(net)
    stock = ModelCheckpoint(tmp_path, save_weights_only=True)
    for settings, message in (
        ({"callbacks": WeightAveraging(), "max_epochs": -1}, "`max_steps` to limit training"),
        (
            {"callbacks": [stock, WeightAveraging()], "enable_checkpointing": True},
            "`ModelCheckpoint` to save all beside `WeightAveraging`",
        ),
        (
            {"callbacks": averaging(batch_norm="reestimate", dataset=dataset(0))},
            "`dataset` to have images",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_trainer(num_sanity_val_steps=0, **settings).fit(net)
    assert same(snapshot(net), initial)


class Transfers(TorchDispatchMode):
    """The operations whose tensors are on two devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.found.append(str(function))
        return output


def test_a_step_copies_nothing_to_the_device():
    callback, net = averaging(0.9), module()
    trainer = Mock(optimizers=[], checkpoint_callbacks=[], global_step=0)
    callback.setup(trainer, net, "fit")
    callback.effective_decay = 0.9
    # The network is on another device than the CPU.
    callback._average_model.module.to("meta")
    net.to("meta")
    callback.on_fit_start(trainer, net)
    with Transfers() as transfers:
        for trainer.global_step in (1, 2, 3):
            callback.on_train_batch_end(trainer, net, None, None, 0)
    assert int(callback._average_model.n_averaged) == 3
    assert transfers.found == []
