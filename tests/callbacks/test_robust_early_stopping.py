import os

import pytest
import torch
from networks_for_tests import same, snapshot, tiny_body
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import FinalEvaluation, RobustEarlyStopping
from robust_flatness.callbacks.robust_early_stopping import early_stopping_of
from robust_flatness.lightning_modules import AT


class Scripted(RobustEarlyStopping):
    """Early stopping that is told what it measures, epoch by epoch."""

    def __init__(self, errors, **kwargs):
        super().__init__(dataset=dataset(4), **kwargs)
        self.errors, self.weights = errors, []

    def compute(self, trainer, module):
        self.weights.append(snapshot(module))
        return {"val/robust_error": self.errors[trainer.current_epoch]}


def fit(callback, epochs, **kwargs):
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
    trainer.fit(AT(tiny_body, **PLAIN), loader(8), **kwargs)
    return trainer


def test_keeps_the_earliest_best_weights_and_does_not_stop():
    callback = Scripted([0.9, 0.5, 0.7, 0.5, 0.6])
    trainer = fit(callback, 5)
    assert trainer.current_epoch == 5
    assert (callback.best_epoch, callback.best_error) == (1, 0.5)
    assert same(callback.best_weights, callback.weights[1])
    assert not same(callback.best_weights, callback.weights[3])
    assert callback.trajectory == {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.5, 4: 0.6}


def test_stops_only_if_asked():
    trainer = fit(Scripted([0.9, 0.5, 0.7, 0.5, 0.6, 0.6], patience=2), 6)
    assert trainer.current_epoch == 4


def test_measures_every_nth_epoch_and_the_last():
    callback = Scripted([0.9, 0.1, 0.5, 0.1, 0.4, 0.3], every_n_epochs=2)
    fit(callback, 6)
    assert callback.trajectory == {0: 0.9, 2: 0.5, 4: 0.4, 5: 0.3}
    assert callback.best_epoch == 5


def test_state_survives_a_checkpoint(tmp_path):
    # The second epoch without a better one comes after the resume, and ends training.
    errors = [0.9, 0.5, 0.7, 0.6, 0.6, 0.6]
    whole = Scripted(errors, patience=2)
    fit(whole, 6)
    first = Scripted(errors, patience=2)
    fit(first, 3).save_checkpoint(tmp_path / "a.ckpt")
    resumed = Scripted(errors, patience=2)
    trainer = fit(resumed, 6, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.current_epoch == 4
    assert resumed.best_epoch == whole.best_epoch == 1
    assert resumed.trajectory == whole.trajectory


def test_logs_what_it_measures_and_serves_stock_checkpoints(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = RobustEarlyStopping(dataset=dataset(12), eps=0.1, steps=2)
    stock = ModelCheckpoint(tmp_path, "best", monitor="val/robust_error", mode="min")
    trainer = quiet_trainer(max_epochs=3, callbacks=[stock, callback], enable_checkpointing=True)
    trainer.fit(AT(tiny_body, **PLAIN), loader(8))
    logged = set(trainer.callback_metrics)
    assert {"val/error", "val/robust_loss", "val/robust_error"} <= logged
    assert "val/robust_loss_correct" not in logged
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["epoch"] == callback.best_epoch
    assert same(saved["state_dict"], callback.best_weights)
    assert early_stopping_of(trainer) is callback


def test_bad_patience_is_named():
    with pytest.raises(ValueError, match="`patience` to be >= 1 but got 0"):
        RobustEarlyStopping(patience=0)


def test_what_a_spawned_process_keeps_is_named(capfd, monkeypatch):
    # Pytest collects the warnings of the other process, which is then gone.
    tell = "robust_flatness.callbacks.measuring.rank_zero_warn"
    monkeypatch.setattr(tell, lambda text: os.write(2, text.encode()))
    kept, final = (
        Scripted([0.9]),
        FinalEvaluation(
            datasets={"test": dataset(4)}, splits=["test"], steps=1, restarts=1, num_perturbations=1
        ),
    )
    trainer = quiet_trainer(callbacks=[kept, final], strategy="ddp_fork", devices=1)
    trainer.fit(AT(tiny_body, **PLAIN), loader(8))
    said = capfd.readouterr().err
    assert "best_weights, best_epoch, trajectory of Scripted will be empty" in said
    assert "final_results, final_arrays of FinalEvaluation will be empty" in said
    # What is said is true, and so is what remains.
    assert kept.best_weights == {}
    assert final.final_results["final"] == {}
    assert trainer.callback_metrics["val/robust_error"] == torch.tensor(0.9)
