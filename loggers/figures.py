"""Figures of a run in Weights & Biases, TensorBoard and MLflow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from robust_flatness.loggers.wandb import log_trajectory, trajectory_points

COLUMNS = ("epoch", "flatness", "robust_loss")


def log_figures(
    logger: Logger,
    rows: Sequence[Mapping[str, float]],
    images: Mapping[str, Path],
    names: tuple[str, str] = ("flatness/average/test", "test/robust_loss"),
) -> None:
    """Logs the figures of a run and its path through flatness and robust loss.

    W&B gets images, a table and a chart, see `log_trajectory`; TensorBoard the images
    `figures/<name>` and the path as the table `trajectory` among its texts, at the epoch as step;
    MLflow the artifacts `figures/<name>.png` and `trajectory.csv`. Other loggers get nothing.

    Args:
        logger: A logger of Lightning.
        rows: Rows of `EpochCSVLogger`. Those without both metrics are not in the path.
        images: PNG files by name.
        names: The metrics of flatness and robust loss.
    """
    if isinstance(logger, WandbLogger):
        log_trajectory(logger, rows, images, names)
        return
    points = trajectory_points(rows, names)
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger, points, images, int(rows[-1]["epoch"]))
    elif isinstance(logger, MLFlowLogger):
        _to_mlflow(logger, points, images)


def _to_tensorboard(
    logger: TensorBoardLogger, points: list[list[float]], images: Mapping[str, Path], epoch: int
) -> None:
    import numpy as np
    from PIL import Image

    writer: Any = logger.experiment
    for name, path in images.items():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        writer.add_image(f"figures/{name}", pixels, epoch, dataformats="HWC")
    if points:
        table = [list(COLUMNS), ["---"] * len(COLUMNS), *_texts(points)]
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        writer.add_text("trajectory", "\n".join(lines), epoch)
    writer.flush()


def _to_mlflow(logger: MLFlowLogger, points: list[list[float]], images: Mapping[str, Path]) -> None:
    client, run_id = logger.experiment, logger.run_id
    for path in images.values():
        client.log_artifact(run_id, str(path), "figures")
    if points:
        lines = [",".join(cells) for cells in (COLUMNS, *_texts(points))]
        # A text replaces its earlier version; MLflow's tables are appended to.
        client.log_text(run_id, "\n".join(lines) + "\n", "trajectory.csv")


def _texts(points: list[list[float]]) -> list[list[str]]:
    return [[f"{value:.6g}" for value in point] for point in points]
