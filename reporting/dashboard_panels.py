"""What a W&B dashboard shows: sections of panels, by the names under which runs are logged.

Every panel draws one figure for all methods. The seeds of a method share its W&B group: curves show
their mean and range, bars their mean. `wandb_workspaces` is an extra, imported when first needed.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

# W&B shows ten runs in a panel unless told otherwise, and Table 1 with three seeds has 57.
MOST_RUNS = 300


class DashboardSection(NamedTuple):
    """Panels under one heading.

    Attributes:
        name: The heading.
        text: What to look for, one or two sentences.
        panels: Panels of `wandb_workspaces`.
        columns: How many of them stand side by side.
    """

    name: str
    text: str
    panels: list[Any]
    columns: int = 3


def dashboard_library(name: str) -> ModuleType:
    """Imports a module of `wandb_workspaces`.

    Args:
        name: `workspaces` or `reports.v2`.

    Raises:
        ValueError: If the extra is not installed.
    """
    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise ValueError(
            "Expected wandb-workspaces to be installed for a W&B dashboard: "
            f"`pip install 'robust-flatness[dashboard]'`; {error}."
        ) from error


def dashboard_sections() -> list[DashboardSection]:
    """Builds all sections anew, as panels remember where they were put.

    Raises:
        ValueError: If the extra `dashboard` is not installed.
    """
    return [_robust_overfitting(), _flatness(), _final_figures(), _training()]


def _robust_overfitting() -> DashboardSection:
    return DashboardSection(
        "Robust overfitting",
        "Where a method overfits robustly, RLoss on training images falls towards 0 while RLoss on "
        "test images turns up (Fig. 2). Training images are measured with the weights at rest; the "
        "early-stopping images choose the early-stopped weights.",
        [
            _curve("RLoss, test", "test/robust_loss"),
            _curve("RLoss, train", "train_eval/robust_loss"),
            _curve("RLoss, early-stopping images", "val/robust_loss"),
            _curve("RErr (PGD), test", "test/robust_error"),
            _curve("RErr (PGD), train", "train_eval/robust_error"),
            _curve("RErr (PGD), early-stopping images", "val/robust_error"),
        ],
    )


def _flatness() -> DashboardSection:
    return DashboardSection(
        "Flatness",
        "How much RLoss rises when the weights move by a share of each layer's norm: smaller is "
        "flatter. In the paper, flatter minima go with lower RLoss across methods (Fig. 1). "
        "Worst-case flatness is there where a run measured it.",
        [
            _curve("Average-case flatness, test", "flatness/average/test"),
            _curve("Average-case flatness, train", "flatness/average/train"),
            _curve("Worst-case flatness, test", "flatness/worst/test"),
            _scatter("RLoss against flatness, final weights", "final"),
            _scatter("RLoss against flatness, early-stopped weights", "early_stopped"),
            _trajectories(),
        ],
    )


def _final_figures() -> DashboardSection:
    return DashboardSection(
        "Final figures",
        "The full protocol, once at the end of each run: on the last weights, and on the "
        "early-stopped ones. Means over the runs of a method.",
        [
            _bars("RLoss, final", "final/test/robust_loss"),
            _bars("RErr (PGD), final", "final/test/robust_error"),
            _bars("RErr (AutoAttack), final", "test/autoattack_error"),
            _bars("Average-case flatness, final", "final/flatness/average/test"),
            _bars("RLoss, early-stopped", "early_stopped/test/robust_loss"),
            _bars("RErr (PGD), early-stopped", "early_stopped/test/robust_error"),
            _bars("RErr (AutoAttack), early-stopped", "test/autoattack_error_early_stopped"),
            _bars("Average-case flatness, early-stopped", "early_stopped/flatness/average/test"),
        ],
        columns=4,
    )


def _training() -> DashboardSection:
    return DashboardSection(
        "Training",
        "What training saw on its own batches while the weights moved, and the figures that each "
        "run drew of itself.",
        [
            _curve("Loss of the objective", "train/loss"),
            _curve("RLoss, training batches", "train/robust_loss"),
            _curve("RErr, training batches", "train/robust_error"),
            _curve("Learning rate", "train/learning_rate"),
            _images("Trajectory", "figures/trajectory"),
            _images("Robust overfitting", "figures/overfitting"),
        ],
    )


def _curve(title: str, name: str) -> Any:
    return dashboard_library("reports.v2").LinePlot(
        title=title,
        x="epoch",
        title_x="epoch",
        y=[name],
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_RUNS,
    )


def _bars(title: str, name: str) -> Any:
    return dashboard_library("reports.v2").BarPlot(
        title=title,
        metrics=[name],
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_RUNS,
        max_bars_to_show=MOST_RUNS,
    )


def _scatter(title: str, weights: str) -> Any:
    """A point for each run; its colour is that of its group, as runs are grouped beside it."""
    library = dashboard_library("reports.v2")
    return library.ScatterPlot(
        title=title,
        x=library.SummaryMetric(f"{weights}/flatness/average/test"),
        y=library.SummaryMetric(f"{weights}/test/robust_loss"),
        legend_template="${run:group} ${run:displayName}",
        regression=True,
    )


def _trajectories() -> Any:
    """The chart that each run logs of its own path, of all runs at once (Fig. 5)."""
    # As the chart of one run asks for it; left to itself, the library asks for no name and no id.
    query = {"id": {}, "name": {}, "summaryTable": {"tableKey": "trajectory_table"}}
    return dashboard_library("reports.v2").CustomChart(
        query=query,
        chart_name="wandb/scatter/v0",
        chart_fields={"x": "flatness", "y": "robust_loss"},
        chart_strings={"title": "Trajectories: flatness (x) and RLoss (y) of each epoch"},
    )


def _images(title: str, name: str) -> Any:
    return dashboard_library("reports.v2").MediaBrowser(
        title=title, media_keys=[name], num_columns=3
    )
