"""Finished runs as tables and figures."""

from robust_flatness.plotting.figures import overfitting_figure, trajectory_figure
from robust_flatness.plotting.landscape_figures import landscape_figure, surface_figure
from robust_flatness.reporting.correlation import Correlation, correlate
from robust_flatness.reporting.models import Model, Point, group_models
from robust_flatness.reporting.published import (
    PublishedModel,
    published_models,
    published_trajectories,
)
from robust_flatness.reporting.runs import Run, read_run, read_runs
from robust_flatness.run_folder.environment import hardware, versions
from robust_flatness.run_folder.intervals import error_interval
from robust_flatness.run_folder.json_file import jsonable, write_json
from robust_flatness.run_folder.landscape_file import (
    Landscape,
    read_landscapes,
    write_landscapes,
)
from robust_flatness.run_folder.summary import summary_table

__all__ = [
    "Correlation",
    "Landscape",
    "Model",
    "Point",
    "PublishedModel",
    "Run",
    "correlate",
    "error_interval",
    "group_models",
    "hardware",
    "jsonable",
    "landscape_figure",
    "overfitting_figure",
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
