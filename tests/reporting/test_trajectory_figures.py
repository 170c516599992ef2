import numpy as np
import pytest
from run_factory import make_run

from robust_flatness.reporting.models import Model, group_models
from robust_flatness.reporting.trajectory_figures import trajectories_figure

FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"


def rows(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"epoch": e, FLATNESS: x, LOSS: y} for e, (x, y) in enumerate(points)]


def model(method: str, *points: tuple[float, float], seed: int = 0) -> Model:
    (found,) = group_models([make_run(method, seed, trajectory=rows(*points), epochs=len(points))])
    return found


def test_points_are_means_over_seeds_coloured_by_the_share_of_training() -> None:
    points = [((0.5, 2.0), (1.0, 1.5)), ((1.5, 3.0), (2.0, 2.5))]
    runs = [make_run("at", s, trajectory=rows(*seed), epochs=2) for s, seed in enumerate(points)]
    panel, bar = trajectories_figure(group_models(runs)).axes
    (dots,) = panel.collections
    assert np.asarray(dots.get_offsets()) == pytest.approx(np.array([[1.0, 2.5], [1.5, 2.0]]))
    assert list(dots.get_array()) == [0.5, 1.0]
    assert dots.get_clim() == (0, 1)
    joined, ring = panel.lines
    assert list(joined.get_xdata()) == [1.0, 1.5]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([1.5], [2.0])
    assert panel.get_title() == "AT"
    assert bar.get_ylabel() == "share of training"


def test_epochs_without_both_figures_are_left_out() -> None:
    given = [*rows((0.5, 2.0), (1.0, 1.5)), {"epoch": 2, LOSS: 1.4}, {"epoch": 3, FLATNESS: 1.4}]
    panel, _ = trajectories_figure(group_models([make_run("at", trajectory=given)])).axes
    assert len(panel.collections[0].get_offsets()) == 2


def test_the_papers_panels_come_first_and_all_share_their_axes() -> None:
    names = ["at", "mart", "at_awp", "unlabeled", "self_supervision"]
    models = [model(name, (0.5, 2.0), (1.0 + i, 1.5 + i)) for i, name in enumerate(names)]
    *panels, _ = trajectories_figure(models, title="t").axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["AT", "Self-supervision", "AT-AWP", "+Unlabeled", "MART"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert panels[0].get_xlim()[1] > 5.0
    assert panels[0].get_ylim()[1] > 5.5


def test_a_first_epoch_far_away_does_not_press_the_others_together() -> None:
    far = [(50.0, 90.0), *((1.0, 2.0) for _ in range(39))]
    panel, _ = trajectories_figure([model("at", *far)]).axes
    assert panel.get_xlim()[1] < 2.0
    assert panel.get_ylim()[1] < 3.0
    assert len(panel.collections[0].get_offsets()) == 40


def test_published_points_are_pale_behind_models_of_their_method() -> None:
    published = {
        "at": [
            {"progress": 1.0, FLATNESS: 1.66, LOSS: 3.8},
            {"progress": 0.0, FLATNESS: 0.2, LOSS: 1.7},
        ],
        "unlabeled": [{"progress": 0.0, FLATNESS: 0.2}],
    }
    models = [model(name, (0.5, 2.0), (1.0, 1.5)) for name in ("at", "unlabeled")]
    figure = trajectories_figure(models, published)
    at, unlabeled, _ = figure.axes
    pale = at.lines[0]
    assert (list(pale.get_xdata()), list(pale.get_ydata())) == ([0.2, 1.66], [1.7, 3.8])
    assert pale.get_zorder() < at.collections[0].get_zorder()
    assert at.get_ylim()[1] > 3.8
    assert len(unlabeled.lines) == len(at.lines) - 1
    assert "published (CIFAR-10)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_nothing_to_draw_is_no_figure() -> None:
    assert trajectories_figure([]) is None
    (losses,) = group_models([make_run(trajectory=[{"epoch": 0, LOSS: 1.0}])])
    assert trajectories_figure([losses]) is None


def test_at_most_twenty_panels() -> None:
    models = [model(f"method{i}", (0.5, 2.0), (1.0, 1.5)) for i in range(22)]
    assert len(trajectories_figure(models).axes) == 21
