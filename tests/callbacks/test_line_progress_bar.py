"""Progress on a terminal and in a log file."""

import io
import re

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from robust_flatness.callbacks import AutoAttack, LineProgressBar, RobustEvaluation
from robust_flatness.callbacks.line_progress_bar import epoch_text
from robust_flatness.loggers import EpochCSVLogger


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, images):
        return self.layer(images.flatten(1))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        for name in ("loss", "error"):
            self.log(
                f"train/robust_{name}", loss.detach().clamp(0, 1), on_epoch=True, on_step=False
            )
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 2, 2, generator=generator)
    return TensorDataset(images, torch.arange(6) % 4)


def shown(*callbacks: Callback, terminal: bool, epochs: int = 3) -> str:
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=terminal)
    small = {"num_examples": 5}
    attack = AutoAttack(dataset=data(), attacks=["apgd-ce"], chunk_size=2, **small)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[LineProgressBar(console), attack, *callbacks],
        logger=EpochCSVLogger(None),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), DataLoader(data(), batch_size=3))
    return output.getvalue()


def test_a_log_has_a_line_an_epoch_and_the_first_and_the_last_are_never_left_out(monkeypatch):
    lines = shown(terminal=False).splitlines()
    metrics = r"train RLoss \d\.\d\d RErr \d+ %"
    assert re.fullmatch(rf"epoch 0/2  {metrics}  \d:\d\d:\d\d left", lines[0])
    assert re.fullmatch(rf"epoch 2/2  {metrics}  0:00:00 left", lines[-1])
    # Epochs of milliseconds: no more than one line in two seconds.
    assert len(lines) == 2
    monkeypatch.setattr("robust_flatness.callbacks.line_progress_bar._EPOCHS", 0.0)
    monkeypatch.setattr("robust_flatness.callbacks.line_progress_bar._MEASURES", 0.0)
    lines = shown(terminal=False).splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["0/2", "1/2", "2/2"]
    counts = [re.search(r"test: AutoAttack, images  (\d/5)", line) for line in lines[3:]]
    # Images of a chunk are attacked together.
    assert [count[1] for count in counts if count] == ["2/5", "4/5", "5/5"]


def test_a_log_has_the_lines_of_epochs_that_measure(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        "robust_flatness.callbacks.line_progress_bar.time.monotonic", lambda: clock[0]
    )

    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock[0] += 3

    evaluation = RobustEvaluation(dataset=data(), num_examples=5, steps=1)
    lines = shown(Slow(), evaluation, terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    assert all("test RLoss" in line for line in lines)


def test_a_terminal_shows_one_line_of_80_columns(monkeypatch):
    monkeypatch.setattr("robust_flatness.callbacks.line_progress_bar._ON_TERMINAL", 0.0)
    text = shown(terminal=True)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert "epoch 1/2  batch 2/2  train RLoss" in plain
    # After training there is no epoch.
    assert any(line.startswith("test: AutoAttack, images  4/5") for line in plain.split("\r"))
    # No second line: the cursor never moves up.
    assert "\x1b[1A" not in text.split("epoch 0/2", 1)[1].rsplit("5/5", 1)[0]
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]", plain))


def test_images_of_validation_stand_for_those_of_the_test():
    row = {f"{prefix}/robust_loss": 1.0 for prefix in ("train", "val", "test")}
    assert epoch_text(row) == "train RLoss 1.00  test RLoss 1.00"
    del row["test/robust_loss"]
    assert epoch_text(row) == "train RLoss 1.00  val RLoss 1.00"
    assert epoch_text({"train/loss": 1.0}) == ""
