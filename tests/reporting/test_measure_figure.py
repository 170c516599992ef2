from pathlib import Path

import numpy as np
import pytest
from run_factory import make_run, write_run

from robust_flatness.reporting.measure_figure import schematic_figure
from robust_flatness.reporting.runs import Run, read_run
from robust_flatness.run_folder.files import Landscape

# An even number of steps, none of which is 0.
STEPS = np.linspace(-1, 1, 8)


def run(tmp_path: Path, landscape: Landscape | None, name: str = "final/random") -> Run:
    found = None if landscape is None else {name: landscape}
    return read_run(write_run(tmp_path / "run", make_run("at_awp"), landscapes=found))


def slopes(*factors: float) -> Landscape:
    """Directions along which the loss is 5 + factor · s for each of two images."""
    lines = 5.0 + np.array(factors)[:, None] * STEPS
    return Landscape(STEPS, np.repeat(lines[:, :, None], 2, axis=2))


def test_the_height_of_a_typical_direction_is_marked(tmp_path: Path) -> None:
    figure = schematic_figure(run(tmp_path, slopes(1.0, 4.0, 2.0)))
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    (weights, ends) = (list(zip(line.get_xdata(), line.get_ydata())) for line in points)
    assert weights == [pytest.approx((0.0, 5.0))]
    assert ends == [pytest.approx((-1.0, 3.0)), pytest.approx((1.0, 7.0))]
    arrow = next(text for text in axes.texts if getattr(text, "arrow_patch", None))
    assert (arrow.xy, arrow.xyann) == (pytest.approx((1.0, 5.0)), pytest.approx((1.0, 7.0)))
    words = " ".join(text.get_text() for text in axes.texts)
    assert "RLoss(w + ν) − RLoss(w) = 2.00" in words
    assert "mean over 3 directions ν = 2.33" in words
    # All three directions are drawn.
    assert sum(len(line.get_xdata()) == 8 for line in axes.lines) == 3
    assert figure.get_suptitle() == "AT-AWP on Digits"


def test_one_direction_is_enough(tmp_path: Path) -> None:
    figure = schematic_figure(run(tmp_path, slopes(1.0)))
    assert "RLoss(w + ν) − RLoss(w) = 1.00" in figure.axes[0].texts[-1].get_text()


@pytest.mark.parametrize(
    ("landscape", "name"),
    [
        (None, ""),
        (slopes(1.0), "early_stopped/random"),
        (slopes(1.0), "final/adversarial"),
        (Landscape(0.75 * STEPS - 0.25, np.ones((2, 8, 2))), "final/random"),
        (Landscape(0.75 * STEPS + 0.25, np.ones((2, 8, 2))), "final/random"),
        (Landscape(STEPS, np.full((2, 8, 2), np.inf)), "final/random"),
    ],
)
def test_without_a_landscape_from_end_to_end_there_is_no_figure(
    tmp_path: Path, landscape: Landscape | None, name: str
) -> None:
    assert schematic_figure(run(tmp_path, landscape, name)) is None
