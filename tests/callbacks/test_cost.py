"""The line that says what watching costs, against passes counted with hooks."""

import re
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from robust_flatness.callbacks import (
    Curvature,
    FinalEvaluation,
    Flatness,
    RobustEarlyStopping,
    RobustEvaluation,
    WorstCaseFlatness,
)
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.command_line.run_start import RunStart

SMALL: dict[str, Any] = {"num_examples": 5, "batch_size": 2}


class Counted(LightningModule):
    """Somebody else's module, which counts the images that pass through it while it measures."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        self.passes = [0, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        if not self.network.training:
            self.passes[0] += len(images)
            if logits.requires_grad:
                logits.register_hook(self.count_backward)
        return logits

    def count_backward(self, gradient: torch.Tensor) -> None:
        self.passes[1] += len(gradient)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader:
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), batch_size=4)


def fit(*callbacks: Any, module: LightningModule | None = None, **kwargs: Any) -> Any:
    module = module or Counted()
    trainer = quiet_trainer(**{"max_epochs": 1, "callbacks": list(callbacks)} | kwargs)
    trainer.fit(module, loader(), loader())
    return module


MEASUREMENTS = [
    RobustEvaluation(split="val", steps=3, restarts=2, **SMALL),
    RobustEvaluation(split="val", steps=0, **SMALL),
    RobustEarlyStopping(steps=2, **SMALL),
    Flatness(split="val", steps=3, restarts=2, num_perturbations=3, **SMALL),
    Flatness(split="val", steps=2, restarts=2, num_perturbations=1, protocol="paper", **SMALL),
    Flatness(split="val", loss="clean", num_perturbations=3, **SMALL),
    WorstCaseFlatness(split="val", steps=3, restarts=2, **SMALL),
    WorstCaseFlatness(split="val", steps=3, restarts=2, loss="clean", **SMALL),
]


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_passes_and_names_are_those_of_a_measurement(measurement: Measurement) -> None:
    module, returned = Counted(), {}
    measure = measurement.measure

    def counted(*args: Any) -> dict[str, float]:
        module.passes = [0, 0]
        returned.update(measure(*args))
        return returned

    measurement.measure = counted  # type: ignore[method-assign]
    fit(measurement, module=module)
    assert measurement.count_of_images() == 5
    assert module.passes == [5 * number for number in measurement.passes() or ()]
    assert tuple(returned) == tuple(measurement.metric_names) or set(returned) == set(
        measurement.metric_names
    )


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.findall("Watching costs .*", capsys.readouterr().out)


def test_one_line_before_training_adds_up_what_an_epoch_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    callbacks = [
        Flatness(split="val", steps=9, num_perturbations=3, num_examples=10),
        RobustEarlyStopping(steps=4, num_examples=10, every_n_epochs=2),
        # At the end of the run alone.
        FinalEvaluation(splits=["val"], steps=1, restarts=1, num_perturbations=1, num_examples=4),
    ]
    fit(*callbacks)
    # 4 attacks of 10 and 9 passes, and half of one of 5 + 1 and 4, on 10 images.
    assert said(capsys) == [
        "Watching costs about 430 forward and 380 backward passes of images an epoch, beside 12 of "
        "each for training without attacks."
    ]


def test_what_depends_on_the_network_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    fit(RobustEvaluation(split="val", steps=1, **SMALL), Curvature(split="val", **SMALL))
    (line,) = said(capsys)
    assert line.endswith("; Curvature comes on top, at a cost that depends on the network.")


def test_measures_of_the_end_alone_and_runs_of_our_command_line_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(FinalEvaluation(splits=["val"], steps=1, restarts=1, num_perturbations=1, **SMALL))
    assert said(capsys) == []
    for callback, module, lines in (
        (RunStart, "robust_flatness.lightning_modules.at", 0),
        (RunStart, "theirs", 1),
        (SaveConfigCallback, "robust_flatness.lightning_modules.at", 1),
    ):
        monkeypatch.setattr(callback, "setup", lambda *args, **kwargs: None)
        monkeypatch.setattr(Counted, "__module__", module)
        command_line = callback(None, None)  # type: ignore[arg-type]
        command_line.already_saved = True
        fit(command_line, RobustEvaluation(split="val", steps=1, **SMALL))
        assert len(said(capsys)) == lines
