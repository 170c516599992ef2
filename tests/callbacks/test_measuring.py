"""What is shown of measuring, its cost and progress, and what is kept of measured weights."""

import re
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from trainers import quiet_trainer

from robust_flatness.callbacks import (
    Curvature,
    FinalEvaluation,
    Flatness,
    RobustEarlyStopping,
    RobustEvaluation,
)
from robust_flatness.callbacks.measuring import _progress_bar, data_eps, fingerprint
from robust_flatness.command_line.run_start import RunStart
from robust_flatness.measures.base import DEFAULT_EPS

SMALL: dict[str, Any] = {"num_examples": 5, "batch_size": 2}


class Foreign(LightningModule):
    """Somebody else's module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader:
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), batch_size=4)


def fit(*callbacks: Any) -> None:
    quiet_trainer(callbacks=list(callbacks)).fit(Foreign(), loader(), loader())


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.findall("Measuring takes .*", capsys.readouterr().out)


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
        "Measuring takes about 430 forward and 380 backward passes of images per epoch, training "
        "without attacks 12 of each."
    ]


def test_what_depends_on_the_network_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    fit(RobustEvaluation(split="val", steps=1, **SMALL), Curvature(split="val", **SMALL))
    (line,) = said(capsys)
    assert line.endswith("; Curvature adds passes that depend on the network.")


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
        monkeypatch.setattr(Foreign, "__module__", module)
        command_line = callback(None, None)  # type: ignore[arg-type]
        command_line.already_saved = True
        fit(command_line, RobustEvaluation(split="val", steps=1, **SMALL))
        assert len(said(capsys)) == lines


def test_the_radius_of_the_data_may_be_none_but_no_text() -> None:
    class Data(LightningDataModule):
        eps: Any = None
        train_dataloader = val_dataloader = staticmethod(loader)

    watch, data = RobustEvaluation(split="val", steps=1, **SMALL), Data()
    trainer = quiet_trainer(callbacks=[watch])
    trainer.fit(Foreign(), datamodule=data)
    assert data_eps(trainer) == DEFAULT_EPS
    data.eps = "small"
    with pytest.raises(ValueError, match="`eps` of the datamodule to be a number or None but got"):
        quiet_trainer(callbacks=[watch]).fit(Foreign(), datamodule=data)


@pytest.mark.parametrize(
    ("outputs", "largest", "count", "warns"),
    [(32, 20, 64, True), (32, 2, 64, False), (32, 20, 63, False), (5, 4, 64, False)],
)
def test_features_in_the_place_of_logits_are_a_warning(
    outputs: int, largest: int, count: int, warns: bool
) -> None:
    module = Foreign()
    module.network[1] = nn.Linear(16, outputs)
    with torch.no_grad():
        # The largest output, whatever the image.
        module.network[1].bias[largest] = 100.0
    images = TensorDataset(torch.rand(count, 1, 4, 4), torch.arange(count) % 3)
    watch = RobustEvaluation(dataset=images, steps=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[watch]).fit(module, loader())
    pattern = f"has {outputs} outputs and predicts none of the classes 0 to 2 .* not features"
    assert any(re.search(pattern, str(w.message)) for w in found) == warns


@pytest.mark.parametrize("run", ["fit", "test"])
def test_one_line_says_what_extras_cost(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = loader().dataset.tensors  # type: ignore[attr-defined]
    final = FinalEvaluation(
        splits=["test"],
        datasets={"test": TensorDataset(images, labels)},
        extras=["worst", "curvature", "clean_gradient_norm"],
        **{"steps": 3, "restarts": 2, "num_perturbations": 1, **SMALL},
    )
    getattr(quiet_trainer(callbacks=[final]), run)(Foreign(), loader())
    lines = [line for line in capsys.readouterr().out.splitlines() if "extras" in line]
    # Reference and joint ascent, 2 restarts of 3 steps each.
    assert lines == [
        "Forward + backward passes of each image for extras: worst 16 + 12, curvature depends on "
        "the network, clean_gradient_norm 1 + 1."
    ]


def test_the_tasks_of_lightnings_bar_keep_their_places() -> None:
    bar = RichProgressBar()
    trainer = Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, max_epochs=1)
    bar.setup(trainer, trainer, "fit")
    bar.on_train_start(trainer, trainer)
    assert bar.progress is not None
    first = bar.progress.add_task("training", total=1)
    for what in ("flatness", "robust loss"):
        with _progress_bar(trainer, "val", what, total=2) as on_attack:
            on_attack()
            shown = [task for task in bar.progress.tasks if task.visible]
            assert [(task.description, task.completed) for task in shown] == [
                ("training", 0),
                (f"val: {what}", 1),
            ]
    second = bar.progress.add_task("validation", total=1)
    for task in (first, second):
        assert bar.progress.tasks[task].id == task
    bar.progress.stop()


class Odd(nn.Module):
    """Tensors of many types, shapes and layouts, and a state that is neither weight nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
        self.metric = MeanMetric()
        self.metric.persistent(True)
        for i, kind in enumerate((torch.bfloat16, torch.bool, torch.complex64, torch.float8_e5m2)):
            self.register_buffer(f"buffer{i}", torch.ones((), dtype=kind))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("passing", torch.zeros(1), persistent=False)


def test_a_fingerprint_is_of_all_that_a_checkpoint_holds_of_the_weights() -> None:
    module = Odd()
    before = fingerprint(module)
    module.metric.update(3.0)
    module.passing += 1
    assert fingerprint(module) == fingerprint(deepcopy(module)) == before
    for name, tensor in module.state_dict().items():
        if name.startswith(("weight", "buffer")):
            kept = tensor.clone()
            tensor.copy_(torch.zeros_like(tensor))
            assert fingerprint(module) != before, name
            tensor.copy_(kept)
    assert fingerprint(module) == before
