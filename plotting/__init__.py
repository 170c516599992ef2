"""Matplotlib figures from rows and arrays."""

from robust_flatness.plotting.figures import (
    overfitting_figure,
    plot_overfitting,
    plot_trajectory,
    trajectory_figure,
)

__all__ = ["overfitting_figure", "plot_overfitting", "plot_trajectory", "trajectory_figure"]
