"""Promise 9: averaged weights are what is measured and kept, whatever the order of callbacks."""

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
    train,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from networks_for_tests import same, snapshot, tiny_body, tiny_network
from torch import nn
from trainers import ToyData, quiet_trainer

from robust_flatness.callbacks import (
    Flatness,
    MeasuredCheckpoint,
    RobustEarlyStopping,
    RobustEvaluation,
    WeightAveraging,
)
from robust_flatness.callbacks.measuring import (
    averaged_weights,
    own_weights,
    swapped_weights,
)
from robust_flatness.lightning_modules import AT

LIGHT = {"num_examples": 12, "steps": 2, "eps": 0.1, "batch_size": 5}
BATCH_NORM = pytest.mark.parametrize("batch_norm", ["average", "reestimate"])
KINDS = pytest.mark.parametrize("kind", [averaging, lambda: EMAWeightAveraging(decay=0.8)])


class Counting(nn.Sequential):
    """Has a buffer that moves in training and that no state dict has."""

    def __init__(self):
        super().__init__(*tiny_network())
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x)


class Opener(Callback):
    """Opens contexts in the middle of training, and fails inside."""

    def __init__(self, callback):
        self.callback, self.held = callback, {}

    def everything(self, pl_module):
        return {**snapshot(pl_module), "calls": pl_module.network.calls.clone()}

    def on_train_epoch_end(self, trainer, pl_module):
        held, other = self.held, snapshot(module(network=lambda *_: Counting()))
        held["average"] = self.everything(self.callback._average_model.module)
        held["raw"] = self.everything(pl_module)
        with pytest.raises(RuntimeError), averaged_weights(trainer, pl_module):
            held["inside"] = self.everything(pl_module)
            held["own"] = {**own_weights(pl_module)}
            with pytest.raises(RuntimeError), averaged_weights(trainer, pl_module):
                held["nested"] = self.everything(pl_module)
                raise RuntimeError
            held["after nested"] = self.everything(pl_module)
            raise RuntimeError
        held["after"] = self.everything(pl_module)
        assert own_weights(pl_module) is None
        with swapped_weights(pl_module, other), averaged_weights(trainer, pl_module):
            assert same(snapshot(pl_module), other)
            zeros = {name: torch.zeros_like(value) for name, value in other.items()}
            with swapped_weights(pl_module, zeros):
                assert same(snapshot(pl_module), zeros)
            assert same(snapshot(pl_module), other)
            # A checkpoint that is written here must not hold the other weights.
            assert same(own_weights(pl_module), held["own"])
        held["after swap"] = self.everything(pl_module)


@pytest.mark.parametrize("first", [True, False])
def test_contexts_give_the_averages_once_and_the_weights_back_bit_for_bit(first):
    callback = averaging()
    opener = Opener(callback)
    callbacks = [opener, callback] if first else [callback, opener]
    fit(*callbacks, net=module(network=lambda *_: Counting()))
    held = opener.held
    assert not same(held["raw"], held["average"])
    assert held["raw"]["calls"] != held["average"]["calls"]
    for name in ("inside", "nested", "after nested"):
        assert same(held[name], held["average"]), name
    for name in ("after", "after swap"):
        assert same(held[name], held["raw"]), name
    own = {name.removesuffix("network.calls") or "calls": t for name, t in held["own"].items()}
    assert same({name: own[name] for name in held["raw"]}, held["raw"])


@KINDS
def test_measures_before_and_after_the_callback_see_the_averages(kind):
    """Of this package's callback and of Lightning's."""
    before, after, callback, seen = Spy(), Spy("train"), kind(), Recorder()
    trainer, net = fit(before, callback, after, seen, epochs=2)
    assert len(before.seen) == 2
    for first, second, raw in zip(before.seen, after.seen, seen.epochs):
        assert same(first, second)
        assert not same(first, raw)
    assert same(after.seen[-1], average_of(callback))
    assert same(snapshot(net), average_of(callback))
    # After training the module is the user's.
    with torch.no_grad():
        net.network[0].weight.add_(1)
    changed = snapshot(net)
    before.compute(trainer, net)
    trainer.test(net, ToyData(), verbose=False)
    assert len(before.seen) == 4
    assert same(before.seen[2], changed)
    assert same(before.seen[3], changed)


class Ends:
    """Updates the average at the end of epochs alone, and says what it was then."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self.ends = [*getattr(self, "ends", []), average_of(self)]


class EndsOfLightning(Ends, EMAWeightAveraging):
    pass


class EndsOfOurs(Ends, WeightAveraging):
    pass


ENDS = [(EndsOfLightning, {}), (EndsOfOurs, {"reference_steps": None})]


@pytest.mark.parametrize(("kind", "settings"), ENDS)
def test_averages_of_the_end_of_an_epoch_are_measured_whatever_the_order(tmp_path, kind, settings):
    first, second, last = Spy(), RobustEarlyStopping(**LIGHT), Recorder()
    callback = kind(decay=0.5, **settings)
    best = MeasuredCheckpoint(tmp_path, "{epoch}", "val/robust_error", save_top_k=-1)
    trainer, _ = fit(first, second, callback, last, best, epochs=3, enable_checkpointing=True)
    assert len(first.seen) == 3
    for epoch, (measured, average, own) in enumerate(zip(first.seen, callback.ends, last.epochs)):
        assert same(measured, average)
        assert same(measured, own) == (epoch == 0)
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert same(saved["state_dict"], measured)
    assert [c for c in trainer.callbacks if c in (first, second)] == [first, second]


def test_averages_that_are_not_measured_are_refused_before_training():
    swa = StochasticWeightAveraging(swa_lrs=0.1)
    net = module()
    initial = snapshot(net)
    message = r"Expected Spy\[test\] .* got StochasticWeightAveraging, .*`WeightAver"
    with pytest.raises(ValueError, match=message):
        fit(Spy(), swa, net=net, epochs=2)
    assert same(snapshot(net), initial)
    # Measured after training are the weights that it ends with.
    _, net = fit(final := Final(), StochasticWeightAveraging(swa_lrs=0.1), epochs=2)
    assert same(final.seen[0], snapshot(net))
    quiet_trainer(callbacks=[Spy(), swa]).test(net, ToyData(), verbose=False)


def test_nothing_is_exchanged_before_the_first_update():
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            with averaged_weights(trainer, pl_module):
                assert own_weights(pl_module) is None

    fit(averaging(), Start(), Spy())


@BATCH_NORM
@pytest.mark.parametrize("first", [True, False])
def test_best_weights_and_checkpoints_are_the_averages_that_were_measured(
    tmp_path, batch_norm, first
):
    stopping, callback, seen = RobustEarlyStopping(**LIGHT), averaging(0.5), Recorder()
    callback.batch_norm = batch_norm
    stock = ModelCheckpoint(tmp_path, "best", "val/robust_error", mode="min")
    end = ModelCheckpoint(tmp_path, "last")
    order = [stopping, callback] if first else [callback, stopping]
    spy = Spy()
    fit(stock, end, *order, seen, spy, epochs=3, data=ToyData(16), enable_checkpointing=True)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    epoch = stopping.best_epoch
    assert saved["epoch"] == epoch
    assert same(stopping.best_weights, spy.seen[epoch])
    assert same(saved["state_dict"], spy.seen[epoch])
    assert same(saved["current_model_state"], seen.epochs[epoch])
    assert not same(saved["state_dict"], saved["current_model_state"])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(last["state_dict"], spy.seen[2])
    assert same(last["current_model_state"], seen.epochs[2])
    loaded = AT.load_from_checkpoint(tmp_path / "last.ckpt", network=tiny_body)
    assert same(snapshot(loaded), spy.seen[2])


def test_final_figures_are_those_of_averaged_and_of_kept_weights():
    final, stopping, callback = Final(), Scripted(), averaging()
    fit(final, stopping, callback, epochs=3)
    last, kept = final.seen
    assert same(last, average_of(callback))
    assert same(kept, stopping.best_weights)
    assert final.final_results["final"]["test/weight"] == last[NAME][0, 0, 0, 0].item()
    assert final.final_results["early_stopped"]["test/weight"] == kept[NAME][0, 0, 0, 0].item()
    # The kept weights are those of the end here, though training's own are others.
    final, callback = Final(), averaging()
    fit(final, Scripted(), callback, epochs=1)
    assert len(final.seen) == 1


@BATCH_NORM
def test_training_and_averages_are_bit_identical_with_and_without_measures(batch_norm):
    found = []
    for watched in (False, True):
        callback, seen, net = averaging(batch_norm=batch_norm), Recorder(), Stranger()
        measures = [
            Flatness(num_perturbations=2, **LIGHT),
            RobustEarlyStopping(**LIGHT),
            Final(),
            RobustEvaluation(split="train", **LIGHT),
        ]
        callbacks = [*measures[:2], callback, seen, *measures[2:]] if watched else [callback, seen]
        train(net, *callbacks)
        found.append((seen.epochs[-1], average_of(callback), snapshot(net)))
    for alone, watched in zip(*found):
        assert same(alone, watched)
    assert not same(found[0][0], found[0][1])
    train(Stranger(), plain := Recorder())
    assert same(plain.epochs[-1], found[0][0])


class SaveInValidation(Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step:
            trainer.save_checkpoint(self.path)


@BATCH_NORM
def test_validation_has_the_averages_and_checkpoints_in_it_have_both(tmp_path, batch_norm):
    seen, callback, net = Recorder(), averaging(batch_norm=batch_norm), Stranger()
    spy, initial = Spy(), snapshot(net)
    callbacks = [SaveInValidation(tmp_path / "a.ckpt"), seen, callback, spy]
    quiet_trainer(callbacks=callbacks).fit(net)
    sanity, validated = net.validated
    assert same(sanity, initial)
    assert same(validated, spy.seen[0])
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(saved["state_dict"], validated)
    assert same(saved["current_model_state"], seen.batches[-1])
    assert same(seen.epochs[-1], seen.batches[-1])


class MeasureInValidation(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, *_):
        with averaged_weights(trainer, pl_module):
            self.seen.append(snapshot(pl_module))


@KINDS
def test_measures_within_validation_exchange_nothing_again(kind):
    net, measure = Stranger(), MeasureInValidation()
    train(net, kind(), measure)
    assert len(measure.seen) == len(net.validated) == 3
    for measured, validated in zip(measure.seen, net.validated):
        assert same(measured, validated)


def test_a_failed_validation_gives_the_weights_back():
    seen, callback, net = Recorder(), averaging(), Stranger(fail=True)
    trainer = quiet_trainer(callbacks=[seen, callback])
    with pytest.raises(RuntimeError, match="failed in validation"):
        trainer.fit(net)
    assert not same(net.validated[-1], seen.batches[-1])
    assert same(snapshot(net), seen.batches[-1])
    assert own_weights(net) is None
