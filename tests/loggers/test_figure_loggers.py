"""What TensorBoard and MLflow get of a run; W&B is in test_wandb.py."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from robust_flatness.callbacks.trajectory import Trajectory
from robust_flatness.loggers import log_figures

ROWS = [
    {"epoch": 0, "test/robust_loss": 1.7, "flatness/average/test": 0.2},
    {"epoch": 1, "test/robust_loss": 1.6},
    {"epoch": 2, "test/robust_loss": 2.4, "flatness/average/test": 0.7},
]


@pytest.fixture
def images(tmp_path):
    pixels = np.zeros((5, 9, 3), np.uint8)
    pixels[1, 2] = 255, 0, 128
    Image.fromarray(pixels).save(tmp_path / "trajectory.png")
    return {"trajectory": tmp_path / "trajectory.png"}


def test_tensorboard_gets_image_and_table_at_the_epoch(tmp_path, images):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    log_figures(logger, ROWS, images)
    events = reader.EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("figures/trajectory")
    assert (image.step, image.width, image.height) == (2, 9, 5)
    (text,) = events.Tensors("trajectory/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        *("| epoch | flatness | robust_loss |", "| --- | --- | --- |"),
        *("| 0 | 0.2 | 1.7 |", "| 2 | 0.7 | 2.4 |"),
    ]


class Client:
    """What a run in MLflow has received."""

    def __init__(self):
        self.received = []

    def log_artifact(self, run_id, local_path, artifact_path=None):
        self.received.append((run_id, Path(local_path).name, artifact_path))

    def log_text(self, run_id, text, artifact_file):
        self.received.append((run_id, text, artifact_file))


def test_mlflow_gets_artifacts(images, monkeypatch):
    client = Client()
    monkeypatch.setattr(MLFlowLogger, "experiment", property(lambda self: client))
    monkeypatch.setattr(MLFlowLogger, "run_id", property(lambda self: "r"))
    log_figures(MLFlowLogger.__new__(MLFlowLogger), ROWS, images)
    table = "epoch,flatness,robust_loss\n0,0.2,1.7\n2,0.7,2.4\n"
    assert client.received == [
        ("r", "trajectory.png", "figures"),
        ("r", table, "trajectory.csv"),
    ]


def test_a_logger_that_fails_does_not_end_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(Client, "log_text", fail)
    monkeypatch.setattr(MLFlowLogger, "experiment", property(lambda self: Client()))
    monkeypatch.setattr(MLFlowLogger, "run_id", property(lambda self: "r"))
    callback = Trajectory(figures=False)
    callback._table = SimpleNamespace(rows=ROWS)
    loggers = [CSVLogger(tmp_path), MLFlowLogger.__new__(MLFlowLogger)]
    trainer = SimpleNamespace(is_global_zero=True, loggers=loggers)
    with pytest.warns(UserWarning, match="could not log the trajectory to MLFlowLogger: OSError"):
        callback._draw(trainer, None)
