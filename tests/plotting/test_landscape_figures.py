import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from robust_flatness.plotting.landscape_figures import landscape_figure, surface_figure
from robust_flatness.run_folder.files import Landscape, read_landscapes, write_landscapes

STEPS = np.linspace(-1, 1, 5)


def bowl(height: float = 1.0, directions: int = 3, examples: int = 4) -> Landscape:
    """Directions of curvature 1, 2, …, examples of equal loss."""
    factors = np.arange(1, directions + 1)[:, None, None]
    return Landscape(
        STEPS, height + factors * np.ones((1, 1, examples)) * STEPS[None, :, None] ** 2
    )


def size(figure) -> int:
    png = BytesIO()
    figure.savefig(png, format="png")
    return len(png.getvalue())


def test_lines_are_means_and_of_adversarial_directions_the_highest() -> None:
    figure = landscape_figure(
        {"random": {"AT": bowl(), "AT-AWP": bowl(0.5)}, "adversarial": {"AT": bowl()}}, title="t"
    )
    random, adversarial = figure.axes
    lines = {line.get_label(): line for line in random.lines}
    assert lines["AT"].get_ydata() == pytest.approx(1 + 2 * STEPS**2)
    assert lines["AT-AWP"].get_ydata() == pytest.approx(0.5 + 2 * STEPS**2)
    assert lines["AT"].get_xdata() == pytest.approx(STEPS)
    assert adversarial.lines[0].get_ydata() == pytest.approx(1 + 3 * STEPS**2)
    assert adversarial.lines[0].get_color() == lines["AT"].get_color()
    band = random.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1, 4))
    assert random.get_xlabel() == "step s along random directions"
    assert random.get_ylabel() == "RLoss"
    assert random.get_yscale() == "log"
    assert size(figure) > 10_000


def test_losses_are_cut_at_fifteen_but_never_away() -> None:
    steep = Landscape(STEPS, 1 + 1000 * np.ones((1, 1, 1)) * STEPS[None, :, None] ** 2)
    assert landscape_figure({"random": {"AT": steep}}).axes[0].get_ylim()[1] == 15
    bad = landscape_figure({"random": {"AT": bowl(40.0)}}).axes[0]
    low, high = bad.get_ylim()
    assert low < 40 < 43 < high


def test_one_direction_has_no_band_and_one_kind_one_panel() -> None:
    figure = landscape_figure({"hessian": {"AT": bowl(directions=1)}})
    (axes,) = figure.axes
    assert len(axes.collections) == 0
    assert size(figure) > 5_000


def test_undefined_losses_are_left_out() -> None:
    nowhere = Landscape(STEPS, np.full((2, 5, 3), math.nan))
    assert landscape_figure({}) is None
    assert landscape_figure({"random": {"AT": nowhere}}) is None
    figure = landscape_figure({"random": {"AT": nowhere, "MART": bowl()}, "hessian": {}})
    (axes,) = figure.axes
    assert axes.get_legend_handles_labels()[1] == ["MART"]
    assert size(figure) > 5_000


def test_losses_of_zero_can_be_drawn() -> None:
    assert size(landscape_figure({"random": {"AT": bowl(0.0)}})) > 5_000
    assert size(surface_figure(Landscape(STEPS, np.zeros((5, 5, 2))))) > 5_000


def test_surface_has_the_first_direction_on_the_horizontal_axis() -> None:
    losses = np.ones((5, 5, 2)) + (STEPS > 0.6)[:, None, None]
    figure = surface_figure(Landscape(STEPS, losses), title="AT", loss_name="cross-entropy")
    axes, bar = figure.axes
    high = axes.collections[0].get_paths()[-1].vertices
    assert high[:, 0].min() > 0.4
    assert high[:, 1].min() == -1
    assert bar.get_ylabel() == "cross-entropy"
    assert size(figure) > 10_000


def test_surface_without_finite_losses_is_none() -> None:
    assert surface_figure(Landscape(STEPS, np.full((5, 5, 2), math.nan))) is None


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "landscapes.npz"
    written = {"final/random": bowl(), "final/surface": Landscape(STEPS, np.ones((5, 5, 2)))}
    settings = {"eps": 8 / 255, "length": {"random": 0.5}, "step_size": None}
    write_landscapes(path, written, settings)
    found, again = read_landscapes(path)
    assert again == settings
    assert list(found) == list(written)
    for name, landscape in written.items():
        assert (found[name].losses == landscape.losses).all()
        assert (found[name].coordinates == landscape.coordinates).all()
    assert [file.name for file in path.parent.iterdir()] == ["landscapes.npz"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", image=np.ones(2))
    with pytest.raises(ValueError, match="to be a file of landscapes but got"):
        read_landscapes(tmp_path / "other.npz")
