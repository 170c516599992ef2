import math
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from robust_flatness.plotting import (
    overfitting_figure,
    plot_overfitting,
    plot_trajectory,
    trajectory_figure,
)

ROWS = [
    {
        "epoch": epoch,
        "train/robust_loss": 1.7 - 0.2 * epoch,
        "train/robust_error": 0.6 - 0.1 * epoch,
        "val/robust_error": 0.55,
        "test/robust_loss": 1.5 + 0.3 * epoch,
        "test/robust_loss_correct": 1.0,
        "test/robust_loss_incorrect": 4.0,
        "test/robust_error": 0.52 + 0.01 * epoch,
        "flatness/average/test": 0.1 + 0.2 * epoch,
        "flatness/average/test_sem": 0.05,
    }
    for epoch in range(6)
]


def size(figure) -> int:
    png = BytesIO()
    figure.savefig(png, format="png")
    return len(png.getvalue())


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_trajectory_shows_the_epochs_that_measured_both() -> None:
    rows = [dict(row) for row in reversed(ROWS)]
    del rows[0]["test/robust_loss"]  # epoch 5
    rows[2]["flatness/average/test"] = math.nan  # epoch 3
    del rows[1]["flatness/average/test_sem"]
    figure = trajectory_figure(rows, title="AT")
    axes, bar = figure.axes
    dots = axes.collections[-1]
    assert dots.get_array().tolist() == [0, 1, 2, 4]
    expected = np.array([(0.1, 1.5), (0.3, 1.8), (0.5, 2.1), (0.9, 2.7)])
    assert dots.get_offsets().data == pytest.approx(expected)
    assert axes.get_xlabel() == "average-case flatness in RLoss (lower is flatter)"
    assert axes.get_ylabel() == "test RLoss"
    assert bar.get_ylabel() == "epoch"
    assert [text.get_text() for text in axes.texts] == ["epoch 0", "epoch 4"]
    widths = [segment[1, 0] - segment[0, 0] for segment in axes.collections[0].get_segments()]
    assert widths == pytest.approx([0.1, 0.1, 0.1, 0.0])
    assert size(figure) > 10_000


def test_trajectory_of_one_epoch_marks_one_point() -> None:
    figure = trajectory_figure(ROWS[:1])
    assert len(figure.axes[0].texts) == 1
    assert size(figure) > 5_000


@pytest.mark.parametrize("rows", [[], [{"epoch": 0}], [{"epoch": 0, "test/robust_loss": 1.0}]])
def test_trajectory_without_points_is_none(rows) -> None:
    assert trajectory_figure(rows) is None


def test_overfitting_draws_each_series_over_its_own_epochs() -> None:
    rows = [dict(row) for row in ROWS]
    for row in rows[1::2]:
        del row["test/robust_loss"]
    rows[4]["train/robust_error"] = math.nan
    figure = overfitting_figure(rows, num_classes=10, best_epoch=2)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    expected = np.array([(0, 1.5), (2, 2.1), (4, 2.7)])
    assert lines["test"].get_xydata() == pytest.approx(expected)
    assert lines["guessing (ln 10)"].get_ydata()[0] == pytest.approx(math.log(10))
    assert lines["early stopping"].get_xdata()[0] == 2
    assert "train, weights fixed" not in labels(left)
    lines = {line.get_label(): line for line in right.lines}
    assert lines["train"].get_xdata().tolist() == [0, 1, 2, 3, 5]
    assert labels(right) == ["early-stopping images", "test", "train", "early stopping"]
    assert right.lines[-1].get_ydata()[0] == pytest.approx(0.54)
    assert size(figure) > 10_000


def test_overfitting_shows_fixed_training_images_dashed() -> None:
    figure = overfitting_figure([row | {"train_eval/robust_loss": 1.0} for row in ROWS])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["train, weights fixed"].get_linestyle() == "--"
    assert lines["train"].get_linestyle() == "-"


def test_overfitting_with_one_empty_panel() -> None:
    figure = overfitting_figure([{"epoch": 3, "val/robust_error": 0.5}])
    assert labels(figure.axes[0]) == []
    assert size(figure) > 5_000


@pytest.mark.parametrize("rows", [[], [{"epoch": 0, "val/robust_error": math.nan}]])
def test_overfitting_without_figures_is_none(rows) -> None:
    assert overfitting_figure(rows, num_classes=10, best_epoch=1) is None


def test_plots_return_axes_and_take_frames_and_own_axes():
    frame = pd.DataFrame(ROWS)
    frame.attrs["early_stopped_epoch"] = 2
    axes = plot_trajectory(frame)
    assert axes.get_ylabel() == "test RLoss"
    assert axes.collections[-1].get_array().tolist() == [0, 1, 2, 3, 4, 5]
    figure, (first, left, right) = pyplot.subplots(1, 3)
    assert plot_trajectory(ROWS, axes=first) is first
    assert plot_overfitting(frame, axes=(left, right), num_classes=10) == (left, right)
    assert len(figure.axes) == 4  # and the bar of epochs
    assert {"early stopping", "guessing (ln 10)", "test"} <= set(labels(left))
    assert len(plot_overfitting(ROWS)) == 2
    pyplot.close("all")
    for plot in (plot_trajectory, plot_overfitting):
        with pytest.raises(ValueError, match="Expected `run` to have .* but got 1 epochs"):
            plot([{"epoch": 0}])
    pyplot.close("all")
