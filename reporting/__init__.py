"""Finished runs as frames, tables, figures and one page."""

from robust_flatness.plotting.figures import (
    overfitting_figure,
    plot_overfitting,
    plot_trajectory,
    trajectory_figure,
)
from robust_flatness.plotting.landscape_figures import landscape_figure, surface_figure
from robust_flatness.reporting.correlation import Correlation, correlate
from robust_flatness.reporting.frame import Models, group_runs, read_run, read_runs
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.run_folder.environment import hardware, versions
from robust_flatness.run_folder.files import (
    Landscape,
    jsonable,
    read_landscapes,
    write_json,
    write_landscapes,
)
from robust_flatness.run_folder.runs import Run, find_runs
from robust_flatness.run_folder.summary import error_interval, summary_table

__all__ = [
    "Correlation",
    "Landscape",
    "Models",
    "Run",
    "correlate",
    "error_interval",
    "find_runs",
    "group_runs",
    "hardware",
    "jsonable",
    "landscape_figure",
    "overfitting_figure",
    "plot_overfitting",
    "plot_trajectory",
    "published_models",
    "published_trajectories",
    "read_landscapes",
    "read_run",
    "read_runs",
    "summary_table",
    "surface_figure",
    "trajectory_figure",
    "versions",
    "write_json",
    "write_landscapes",
]
