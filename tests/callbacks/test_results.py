"""`Results` beside a toy module, a datamodule, and a callback that has final figures."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from robust_flatness.callbacks.results import Results
from robust_flatness.callbacks.trajectory import Trajectory
from robust_flatness.loggers import EpochCSVLogger


class Toy(LightningModule):
    def __init__(self, eps: float = 8 / 255) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = torch.nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.network(batch[0]).square().mean()
        self.log("train/robust_loss", loss, on_epoch=True, on_step=False)
        self.log("val/robust_error", 0.5 + 0.1 * self.current_epoch, on_epoch=True, on_step=False)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/error", 0.25)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Points(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)

    test_dataloader = train_dataloader

    def split_indices(self) -> dict[str, list[int]]:
        return {"test": [3, 1, 2], "val": [0]}


class Measure(Callback):
    best_epoch = 1

    def __init__(self) -> None:
        self.final_results = {
            "final": {
                "test/robust_error": 0.6,
                "test/robust_loss": math.nan,
                "val/robust_error": 0.3,
            },
            "early_stopped": {"test/robust_error": 0.5},
            "num_examples": {"test/robust_error": 200},
        }


class Attack(Callback):
    best_epoch = -1  # as a callback says that has kept none

    def __init__(self) -> None:
        self.final_results = {"final": {"test/autoattack_error": 0.7}, "early_stopped": {}}


def make_trainer(folder: Path, *callbacks: Callback, epochs: int = 3, **kwargs: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        **{"logger": EpochCSVLogger(folder)} | kwargs,
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_results_hold_everything_a_report_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed_everything(5, verbose=False)
    callbacks = [Attack(), Measure(), Trajectory(figures=False), Results({"steps": range(2)})]
    make_trainer(tmp_path, *callbacks).fit(Toy(), datamodule=Points())
    results = read(tmp_path / "results.json")
    rows = EpochCSVLogger(tmp_path).rows
    assert (results["method"], results["data"], results["seed"]) == ("Toy", "Points", 5)
    assert results["settings"] == {"steps": [0, 1]}
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["hardware"]["num_processes"] == 1
    assert results["wall_time_seconds"] >= 0
    assert results["epochs"] == 3
    assert results["split_indices"] == {"test": [3, 1, 2], "val": [0]}
    assert results["early_stopped_epoch"] == 1
    assert results["num_examples"] == {"test/robust_error": 200}
    assert results["trajectory"] == rows
    assert len(rows) == 3
    # Figures of callbacks, and of the rows of the last and of the early-stopped epoch.
    assert results["final"] == {
        "train/robust_loss": rows[2]["train/robust_loss"],
        "val/robust_error": 0.3,  # and 0.7 in the row
        "test/robust_error": 0.6,
        "test/robust_loss": None,
        "test/autoattack_error": 0.7,
    }
    assert results["early_stopped"]["test/robust_error"] == 0.5
    assert results["early_stopped"]["val/robust_error"] == pytest.approx(0.6)
    printed = capsys.readouterr().out
    assert "60.0 % [53.1, 66.5]" in printed
    assert "(epoch 1)" in printed
    assert tmp_path.name in printed.replace("\n", "")


def test_parts_of_a_final_metric_are_not_those_of_an_epoch(tmp_path: Path) -> None:
    class Epochs(Toy):
        def on_train_epoch_end(self) -> None:
            # The final measure has no incorrect examples, and the error of the flatness is of
            # other directions than its value.
            self.log_dict({"test/robust_loss_incorrect": 9.0, "test/error": 0.5})
            self.log_dict({"flatness/average/test": 1.0, "flatness/average/test_sem": 0.1})

    measured = Measure()
    measured.final_results["final"] |= {"test/robust_loss": 2.0, "flatness/average/test": 0.5}
    callbacks = [measured, Trajectory(figures=False), Results()]
    make_trainer(tmp_path, *callbacks).fit(Epochs(), datamodule=Points())
    results = read(tmp_path / "results.json")
    names = {"train/robust_loss", "val/robust_error", "test/error", "flatness/average/test"}
    assert results["final"].keys() == {*names, "test/robust_error", "test/robust_loss"}
    # Nothing but the error was measured on these weights at the end.
    assert results["early_stopped"]["flatness/average/test_sem"] == pytest.approx(0.1)


class Diverges(Toy):
    """Has figures of fixed images that are not finite from the second epoch on."""

    names: tuple[str, ...] = ("val/robust_loss",)

    def on_train_epoch_end(self) -> None:
        for name in self.names:
            self.log(name, math.nan if self.current_epoch > 0 else 1.0)
        # Perturbed weights may overflow where the network is finite.
        self.log("flatness/average/test", math.inf)
        self.log("train/loss", math.nan)


@pytest.mark.parametrize("epochs", [1, 3])
def test_results_say_from_which_epoch_on_a_network_was_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int
) -> None:
    callbacks = [Trajectory(figures=False), Results()]
    make_trainer(tmp_path, *callbacks, epochs=epochs).fit(Diverges(), datamodule=Points())
    results = read(tmp_path / "results.json")
    assert results["diverged_epoch"] == (1 if epochs > 1 else None)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("diverged, not finite from epoch 1" in printed) == (epochs > 1)


def test_a_network_that_is_measured_at_the_end_only_has_diverged_by_then(tmp_path: Path) -> None:
    make_trainer(tmp_path, Measure(), Results()).fit(Toy(), datamodule=Points())
    assert read(tmp_path / "results.json")["diverged_epoch"] == 2


def test_a_bare_module_without_loggers_has_results_too(tmp_path: Path) -> None:
    make_trainer(tmp_path, Results(), logger=False).fit(Toy(), Points().train_dataloader())
    results = read(tmp_path / "results.json")
    assert results["data"] is None
    assert results["settings"] == {"eps": 8 / 255}
    assert results["final"] == results["early_stopped"] == {}
    assert results["trajectory"] == []
    assert results["early_stopped_epoch"] is results["split_indices"] is None


def test_testing_writes_its_own_file(tmp_path: Path) -> None:
    fitted = make_trainer(tmp_path, Trajectory(figures=False), Results())
    fitted.fit(Toy(), datamodule=Points())
    before = (tmp_path / "results.json").read_text()
    trainer = make_trainer(tmp_path, Measure(), Results())
    trainer.test(Toy(), datamodule=Points(), verbose=False)
    results = read(tmp_path / "results_test.json")
    # And what the module logs.
    assert results["final"].keys() == {*Measure().final_results["final"], "test/error"}
    assert results["early_stopped"] == {"test/robust_error": 0.5}
    assert len(results["trajectory"]) == 3
    assert "epochs" not in results
    assert (tmp_path / "results.json").read_text() == before


def test_an_earlier_test_with_other_metrics_stays(tmp_path: Path) -> None:
    def test(**metrics: float) -> None:
        measure = Measure()
        measure.final_results["final"] = dict(metrics)
        make_trainer(tmp_path, measure, Results()).test(Toy(), datamodule=Points(), verbose=False)

    names = {"test/robust_loss": 2.0, "hessian/trace": 1.0}
    test(**names)
    # It has all that the first one has.
    test(**names)
    assert not list(tmp_path.glob("results_test-*.json"))
    test(**{"test/robust_loss": 2.0, "margin/test": 0.5})
    test(**names)
    files = {path.name: read(path)["final"] for path in tmp_path.glob("results_test*.json")}
    assert len(files) == 3
    assert files["results_test.json"].keys() == files["results_test-1.json"].keys()
    assert "margin/test" in files["results_test-2.json"]


def test_wall_time_adds_up_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wait(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock.append(clock[-1] + 100.0)

    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    checkpoint = {"filename": "last", "enable_version_counter": False}
    last = tmp_path / "checkpoints" / "last.ckpt"
    for epochs, expected in ((2, 200.0), (3, 300.0)):
        trainer = make_trainer(
            tmp_path, Wait(), Results(), ModelCheckpoint(**checkpoint), epochs=epochs
        )
        trainer.fit(Toy(), datamodule=Points(), ckpt_path=last if epochs == 3 else None)
        assert read(tmp_path / "results.json")["wall_time_seconds"] == expected
        clock.append(clock[-1] + 5000.0)


def test_results_say_what_a_resumed_run_was_trained_with_before(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    for epochs, lam in ((1, 6.0), (2, 6.0), (3, 9.0), (4, 9.0)):
        checkpoint = ModelCheckpoint(filename="last", enable_version_counter=False)
        results = Results({"lam": lam})
        trainer = make_trainer(tmp_path, results, checkpoint, epochs=epochs)
        trainer.fit(Toy(), datamodule=Points(), ckpt_path=last if epochs > 1 else None)
        written = read(tmp_path / "results.json")
        expected = [{"before_epoch": 2, "settings": {"lam": 6.0}}] if epochs > 2 else None
        assert written.get("earlier_settings") == expected
        assert written["settings"] == {"lam": lam}


@pytest.mark.parametrize("indices", [{"test": [0]}, lambda part: [0]])
def test_split_indices_of_another_meaning_are_left_out(tmp_path: Path, indices: Any) -> None:
    data = Points()
    data.split_indices = indices  # type: ignore[method-assign]
    make_trainer(tmp_path, Results()).fit(Toy(), datamodule=data)
    assert read(tmp_path / "results.json")["split_indices"] is None


def test_fast_dev_run_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, Results(), logger=False, fast_dev_run=True)
    trainer.fit(Toy(), datamodule=Points())
    assert list(tmp_path.iterdir()) == []
