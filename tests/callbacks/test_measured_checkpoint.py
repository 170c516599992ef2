"""Checkpoints hold weights that were measured, under their own scores."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from networks_for_tests import same, tiny_body
from test_epoch_measures import Stop
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import MeasuredCheckpoint, RobustEarlyStopping, WeightAveraging
from robust_flatness.lightning_modules import AT


class Scripted(RobustEarlyStopping):
    """Early stopping that is told what it measures, epoch by epoch."""

    def __init__(self, errors, **kwargs):
        super().__init__(dataset=dataset(4), **kwargs)
        self.errors, self.epoch = errors, 0

    def measure_epoch(self, trainer, module, epoch):
        self.epoch = epoch
        return super().measure_epoch(trainer, module, epoch)

    def compute(self, trainer, module):
        return {"val/robust_error": self.errors[self.epoch], "val/robust_loss": 1.0}


def fit(folder, measure, epochs=100, others=(), module=AT, **kwargs):
    def checkpoint(**settings):
        return MeasuredCheckpoint(folder, enable_version_counter=False, **settings)

    callbacks = [
        *others,
        measure,
        checkpoint(filename="best", monitor="val/robust_error"),
        checkpoint(filename="{epoch}", monitor="val/robust_error", save_top_k=3, mode="max"),
        checkpoint(filename="last"),
    ]
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **kwargs
    )
    module = module(tiny_body, **PLAIN)
    # Other modules have loaders of their own.
    trainer.fit(module, *([] if isinstance(module, Validates) else [loader(8)]))
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}


def test_only_measured_epochs_are_kept_with_any_number_of_checkpoints(tmp_path):
    measure = Scripted([0.9, 0, 0.3, 0, 0.5, 0, 0.7], every_n_epochs=2)
    saved = fit(tmp_path, measure, epochs=7)
    assert set(saved) == {"best", "last", "epoch=0", "epoch=4", "epoch=6"}
    assert saved["best"]["epoch"] == measure.best_epoch == 2
    assert same(saved["best"]["state_dict"], measure.best_weights)
    (state,) = (s for key, s in saved["last"]["callbacks"].items() if "'max'" in key)
    scores = sorted(round(score.item(), 3) for score in state["best_k_models"].values())
    assert scores == [0.5, 0.7, 0.9]


class Validates(AT):
    """Has a validation of its own, which logs nothing that is measured."""

    def validation_step(self, batch, batch_idx):
        pass

    def train_dataloader(self):
        return loader(16)

    val_dataloader = train_dataloader


VALIDATION = [
    {"check_val_every_n_epoch": 2},
    {"check_val_every_n_epoch": 9},
    {"val_check_interval": 0.5},
    {"num_sanity_val_steps": 0},
]


@pytest.mark.parametrize("validation", VALIDATION)
def test_measured_epochs_are_kept_whenever_validation_runs(tmp_path, validation):
    measure = Scripted([0.9, 0.4, 0.3, 0, 0.5], every_n_epochs=2)
    saved = fit(tmp_path, measure, epochs=5, module=Validates, **validation)
    assert {*saved} - {"last"} == {"best", "epoch=0", "epoch=2", "epoch=4"}
    assert saved["best"]["epoch"] == measure.best_epoch == 2
    assert same(saved["best"]["state_dict"], measure.best_weights)


def test_a_run_that_goes_on_saves_when_it_has_measured(tmp_path):
    checkpoint = {"monitor": "val/robust_error", "enable_version_counter": False}
    path, found = tmp_path / "a.ckpt", []
    for epochs, ckpt_path in ((2, None), (5, path)):
        measure = Scripted([0.9, 0.8, 0.7, 0.6, 0.5], every_n_epochs=4)
        best = MeasuredCheckpoint(tmp_path, "best", **checkpoint)
        trainer = quiet_trainer(
            max_epochs=epochs, callbacks=[measure, best], enable_checkpointing=True
        )
        module = Validates(tiny_body, **PLAIN)
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(path)
        found.append(torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"])
    assert found == [1, 4]


def test_a_metric_that_an_epoch_does_not_define_is_not_that_of_an_earlier_one(tmp_path):
    class Sometimes(Scripted):
        def compute(self, trainer, module):
            metrics = super().compute(trainer, module)
            if self.epoch == 1:
                del metrics["val/robust_error"]
            return metrics

        def on_measured(self, trainer, module, epoch):
            pass

    assert set(fit(tmp_path, Sometimes([0.9, 0, 0.3]), epochs=3)) == {
        *("best", "last", "epoch=0", "epoch=2")
    }


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_end"])
def test_the_last_epoch_is_a_candidate_however_training_ends(tmp_path, hook, averaged):
    measure = Scripted([0.9, 0, 0, 0.2], every_n_epochs=5)
    others = [WeightAveraging(0.5, reference_steps=None)] if averaged else []
    stop = Stop(hook)
    if hook == "on_train_epoch_end":
        # Behind the measure, which cannot know.
        others, measure.on_train_epoch_end = others, _then(measure.on_train_epoch_end, stop)
    else:
        others = [stop, *others]
    saved = fit(tmp_path, measure, others=others, max_steps=50)
    assert measure.trajectory == {0: 0.9, 3: 0.2}
    assert saved["best"]["epoch"] == measure.best_epoch == 3
    assert same(saved["best"]["state_dict"], measure.best_weights)
    assert set(saved) == {"best", "last", "epoch=0", "epoch=3"}
    # What `test --ckpt_path last.ckpt` takes the early-stopped weights from.
    assert saved["last"]["callbacks"]["Scripted[val]"]["best_epoch"] == 3
    assert saved["last"]["epoch"] == 3


def _then(first, stop):
    def both(trainer, module):
        first(trainer, module)
        stop.on_train_epoch_end(trainer)

    return both


@pytest.mark.parametrize("kind", [EMAWeightAveraging, WeightAveraging])
def test_averages_are_kept_from_their_first_update_on(tmp_path, kind):
    if kind is EMAWeightAveraging:
        averaging = kind(decay=0.5, update_starting_at_step=1)
    else:
        averaging = kind(0.5, reference_steps=None)
        averaging.should_update = lambda step_idx=None, epoch_idx=None: (step_idx or 0) > 0
    # By its error alone the first epoch, of one step, would win.
    measure = Scripted([0.1, 0.6, 0.5])
    saved = fit(tmp_path, measure, epochs=3, others=[averaging])
    assert set(saved) == {"best", "last", "epoch=1", "epoch=2"}
    assert saved["best"]["epoch"] == 2
    assert measure.best_epoch == 0


class ChangesLater(AT):
    """Has other weights, or other statistics, at the end of an epoch than were measured."""

    part = "network.8.weight"

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        if self.current_epoch == 1:
            self.state_dict()[self.part].mul_(2)


class ChangesStatisticsLater(ChangesLater):
    part = "network.1.running_var"


@pytest.mark.parametrize("module", [ChangesLater, ChangesStatisticsLater])
def test_weights_that_changed_after_they_were_measured_are_not_kept(tmp_path, module):
    message = r"changed after Scripted\[val\] had measured them, .* `on_train_epoch_end` of Changes"
    with pytest.warns(UserWarning, match=message):
        saved = fit(tmp_path, Scripted([0.9, 0.1, 0.3]), epochs=3, module=module)
    assert set(saved) == {"best", "last", "epoch=0", "epoch=2"}
    assert saved["best"]["epoch"] == 2


class Breaks(AT):
    """One tensor is not finite at the end of some epochs."""

    broken = (0, 2)
    part, value = "network.8.weight", math.nan

    def on_train_batch_end(self, *args):
        self.whole = self.state_dict()[self.part].clone()
        if self.current_epoch in self.broken:
            self.state_dict()[self.part].fill_(self.value)

    def on_train_epoch_start(self):
        if self.current_epoch > 0:
            self.state_dict()[self.part].copy_(self.whole)


class BreaksStatistics(Breaks):
    part = "network.1.running_var"


class Infinite(Breaks):
    value = math.inf


@pytest.mark.parametrize("module", [Breaks, BreaksStatistics, Infinite])
def test_networks_that_are_not_finite_are_never_kept(tmp_path, module):
    # By its error alone a diverged network would win.
    measure = Scripted([0.1, 0.6, 0.2, 0.5])
    saved = fit(tmp_path, measure, epochs=4, module=module)
    assert measure.best_epoch == saved["best"]["epoch"] == 3
    assert set(saved) == {"best", "last", "epoch=1", "epoch=3"}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_disqualify_too(tmp_path, loss):
    measure = Scripted([0.1, 0.6])
    measured = Scripted.compute
    measure.compute = lambda *args: (
        measured(measure, *args) | ({"val/robust_loss": loss} if measure.epoch == 0 else {})
    )
    assert fit(tmp_path, measure, epochs=2)["best"]["epoch"] == measure.best_epoch == 1


def test_without_a_finite_epoch_nothing_is_kept(tmp_path):
    class Broken(Breaks):
        broken = range(9)

    measure = Scripted([0.1, 0.2])
    assert set(fit(tmp_path, measure, epochs=2, module=Broken)) == {"last"}
    assert (measure.best_epoch, measure.best_weights) == (-1, {})


def test_states_of_the_stock_class_go_on(tmp_path):
    settings = {"monitor": "val/robust_error", "mode": "min"}
    stock, ours = ModelCheckpoint(tmp_path, **settings), MeasuredCheckpoint(tmp_path, **settings)
    assert stock.state_key == ours.state_key
