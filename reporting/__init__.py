"""Finished runs as tables and figures."""

from robust_flatness.reporting.environment import hardware, versions
from robust_flatness.reporting.figures import overfitting_figure, trajectory_figure
from robust_flatness.reporting.intervals import error_interval
from robust_flatness.reporting.json_file import jsonable, write_json
from robust_flatness.reporting.summary import summary_table

__all__ = [
    "error_interval",
    "hardware",
    "jsonable",
    "overfitting_figure",
    "summary_table",
    "trajectory_figure",
    "versions",
    "write_json",
]
