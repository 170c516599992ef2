import math
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_factory import make_models, make_run

from robust_flatness.reporting import matplotlib_figures
from robust_flatness.reporting.figures import Figures, select_models
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.matplotlib_figures import (
    curves_figure,
    draw_series,
    epochs_figure,
    rate_drops,
)
from robust_flatness.run_folder.metrics import METHOD_LABELS
from robust_flatness.run_folder.runs import Run


def models(*methods: str, seeds: int = 1, **options) -> Models:
    return make_models(
        *(make_run(method, seed, **options) for method in methods for seed in range(seeds))
    )


def line(axes: Axes, label: str):
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def trajectories_figure(models: Models, published: pd.DataFrame | None = None, **options) -> Figure:
    figures = Figures(models, trajectories=published)
    return matplotlib_figures.trajectories_figure(figures, **options)


def size(figure: Figure) -> int:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=50)
    return len(png.getvalue())


def test_a_method_has_a_panel_of_losses_and_one_of_errors() -> None:
    classes = {"model": {"init_args": {"num_classes": 10}}}
    found = models("mart", "at", seeds=2, settings=classes)
    figure = curves_figure(found, title="t")
    at, mart, at_errors, _ = figure.axes
    assert (at.get_title(), mart.get_title()) == ("AT", "MART")
    assert line(at, "test").get_xdata() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    row = found.runs["AT"][0].trajectory[-1]
    for axes, label, name in (
        (at, "test", "test/robust_loss"),
        (at, "test, correct when clean", "test/robust_loss_correct"),
        (at, "test, incorrect when clean", "test/robust_loss_incorrect"),
        (at, "train", "train_eval/robust_loss"),
        (at_errors, "test", "test/robust_error"),
        (at_errors, "train", "train_eval/robust_error"),
    ):
        assert line(axes, label).get_ydata()[-1] == pytest.approx(row[name])
    assert line(at, "test").get_linestyle() == "-"
    assert line(at, "train").get_linestyle() != "-"
    assert line(at, "test, correct when clean").get_linewidth() < line(at, "test").get_linewidth()
    assert line(at, "guessing (ln 10)").get_ydata()[0] == pytest.approx(math.log(10))
    assert len(at_errors.collections) == 2
    assert set(texts(figure)) >= {"test", "train", "early stopping", "guessing (ln 10)"}
    assert figure.get_suptitle() == "t"
    assert size(figure) > 10_000


def test_early_stopping_is_a_line_a_seed_and_its_error() -> None:
    runs = [make_run(seed=s, early_stopped_epoch=s + 1) for s in range(2)]
    losses, errors = curves_figure(make_models(*runs)).axes
    stops = [found.get_xdata()[0] for found in losses.lines if "early" in found.get_label()]
    assert stops == [0.5, 0.75]
    level = errors.lines[-1].get_ydata()[0]
    expected = [runs[s].trajectory[s + 1]["test/robust_error"] for s in range(2)]
    assert level == pytest.approx(sum(expected) / 2)
    (losses, _) = curves_figure(models("at", early_stopped_epoch=None)).axes
    assert not [found for found in losses.lines if found.get_label() == "early stopping"]


def test_panels_share_their_axes_and_only_outer_ones_are_labelled() -> None:
    steep = [{"epoch": e, "test/robust_loss": 5.0 + e, "test/robust_error": 0.9} for e in range(4)]
    runs = [make_run(method) for method in list(METHOD_LABELS)[:6]]
    figure = curves_figure(make_models(*runs, make_run("other", trajectory=steep)))
    assert len(figure.axes) == 2 * 7
    losses = [axes for axes in figure.axes if axes.get_title()]
    assert (
        len({axes.get_ylim() for axes in losses}) == len({axes.get_xlim() for axes in losses}) == 1
    )
    assert losses[0].get_ylim()[1] > 8.0
    assert [axes.get_ylabel() for axes in losses] == ["RLoss"] + [""] * 4 + ["RLoss", ""]
    below = [axes.get_xlabel() for axes in figure.axes]
    assert below.count("share of training") == 2


def test_losses_are_cut_at_fifteen() -> None:
    rows = [{"epoch": e, "test/robust_loss": 10.0 ** (2 * e - 3)} for e in range(4)]
    low, high = curves_figure(models("at", trajectory=rows)).axes[0].get_ylim()
    assert (low, high) == (0.03, 15.0)


def test_at_most_twenty_models_are_drawn() -> None:
    figure = curves_figure(models(*(f"method{i}" for i in range(23))))
    assert len(figure.axes) == 40


def test_nothing_to_draw_is_no_figure() -> None:
    assert curves_figure(make_models()) is None
    nothing = models("at", trajectory=[{"epoch": 0, "train/robust_loss": 2.0}])
    assert curves_figure(nothing) is None
    assert epochs_figure(nothing, "AT") is None
    # Losses alone are in `curves_figure`.
    losses = models("at", trajectory=[{"epoch": 0, "test/robust_loss": 2.0}])
    assert epochs_figure(losses, "AT") is None


def test_all_measures_of_a_model_throughout_training() -> None:
    rates = (0.1, 0.1, 0.01, 0.01)
    rows = [row | {"train/learning_rate": r} for row, r in zip(make_run().trajectory, rates)]
    figure = epochs_figure(models("at", trajectory=rows), "AT")
    (axes,) = figure.axes
    assert line(axes, "average-case flatness, test").get_ydata()[-1] == pytest.approx(4.1)
    assert line(axes, "RLoss, test").get_ydata()[0] == pytest.approx(2.3)
    assert line(axes, "RLoss, train").get_ydata()[-1] == pytest.approx(0.16)
    assert line(axes, "λ_max / 100").get_ydata()[-1] == pytest.approx(1.5)
    assert line(axes, "learning rate drops").get_xdata() == [0.5, 0.5]
    assert "worst-case flatness, test" not in texts(figure)
    assert figure.get_suptitle() == "AT"
    assert axes.get_ylim()[0] == 0
    assert size(figure) > 5_000


def test_worst_case_flatness_and_small_eigenvalues_are_drawn_as_they_are() -> None:
    names = ("test/robust_loss", "flatness/worst/test", "hessian/max_eigenvalue")
    rows = [{"epoch": e} | dict(zip(names, (2.0, 3.0 + e, 0.04))) for e in range(3)]
    (axes,) = epochs_figure(models("at", trajectory=rows, epochs=3), "AT").axes
    assert list(line(axes, "worst-case flatness, test").get_ydata()) == [3.0, 4.0, 5.0]
    assert list(line(axes, "λ_max").get_ydata()) == [0.04] * 3


@pytest.mark.parametrize(
    ("rates", "drops"),
    [
        ([0.1] * 3 + [0.01] * 2 + [0.001] * 3, [3 / 8, 5 / 8]),
        ([0.1] * 8, []),
        ([0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.004, 0.001], []),
        ([0.1] * 4 + [0.08] * 4, []),
    ],
)
def test_learning_rate_drops(rates: list[float], drops: list[float]) -> None:
    rows = [{"epoch": e, "train/learning_rate": rate} for e, rate in enumerate(rates)]
    assert rate_drops(make_run(trajectory=rows, epochs=len(rates))) == drops
    assert rate_drops(make_run(trajectory=[{"epoch": 0.0}])) == []


@pytest.mark.parametrize(("seeds", "bands"), [(1, 0), (2, 1)])
def test_a_band_is_drawn_for_several_seeds(seeds: int, bands: int) -> None:
    axes = Figure().add_subplot()
    rows = [[{"epoch": e, "test/robust_loss": s + 1.0 + 2 * e} for e in (0, 1)] for s in (0, 1)]
    runs = [make_run(seed=s, trajectory=rows[s]) for s in range(seeds)]
    series = make_models(*runs).series("AT", "test/robust_loss")
    draw_series(axes, series, color="#000000", label="x")
    assert len(axes.collections) == bands
    assert axes.lines[0].get_label() == "x"
    if bands:
        vertices = axes.collections[0].get_paths()[0].vertices
        assert (vertices[:, 1].min(), vertices[:, 1].max()) == (1.0, 4.0)


def settings(batch_size: int = 64, optimizer: str = "SGD", lam: float = 6.0) -> dict:
    optimizer = {"class_path": f"torch.optim.{optimizer}"}
    return {
        "data": {"init_args": {"batch_size": batch_size}},
        "model": {"init_args": {"lam": lam, "optimizer": optimizer}},
    }


def test_each_method_comes_once_before_any_comes_twice() -> None:
    runs = [make_run("trades", settings=settings(lam=lam)) for lam in (1.0, 6.0, 9.0)]
    runs += [make_run("at", settings=settings()), make_run("mart", settings=settings())]
    found = make_models(*runs)
    first = ["AT", "TRADES lam=1", "MART", "TRADES lam=6"]
    assert select_models(found, found.labels, ["at", "trades"], 4) == first
    last = select_models(found, found.labels, [], 9)[-2:]
    assert last == ["TRADES lam=6", "TRADES lam=9"]
    assert select_models(found, [], ["at"], 4) == []


def test_another_batch_size_and_adam_are_families_of_their_own() -> None:
    runs = [make_run("at", settings=settings(8)), make_run("at", settings=settings(64))]
    runs += [make_run("at", settings=settings(64, "Adam")), make_run("mart", settings=settings())]
    # A row of Table 1 whose preset has another batch size stays that row.
    runs += [make_run("unlabeled", settings=settings(128))]
    found = make_models(*runs)
    preferred = ["at", "unlabeled", "Adam", "another batch size"]
    chosen = select_models(found, found.labels, preferred, 9)
    assert [
        (found.frame.at[label, "method"], found.differs[label].get("data.batch_size"))
        for label in chosen
    ] == [("at", 64), ("unlabeled", None), ("at", 64), ("at", 8), ("mart", None)]
    assert ["Adam" in label for label in chosen] == [False, False, True, False, False]


FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"


def path(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"epoch": e, FLATNESS: x, LOSS: y} for e, (x, y) in enumerate(points)]


def moving(method: str, *points: tuple[float, float], seed: int = 0) -> Run:
    return make_run(method, seed, trajectory=path(*points), epochs=len(points))


def test_points_are_means_over_seeds_coloured_by_the_share_of_training() -> None:
    points = [((0.5, 2.0), (1.0, 1.5)), ((1.5, 3.0), (2.0, 2.5))]
    runs = [moving("at", *seed_points, seed=s) for s, seed_points in enumerate(points)]
    panel, bar = trajectories_figure(make_models(*runs)).axes
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
    rows = [*path((0.5, 2.0), (1.0, 1.5)), {"epoch": 2, LOSS: 1.4}, {"epoch": 3, FLATNESS: 1.4}]
    panel, _ = trajectories_figure(models("at", trajectory=rows)).axes
    assert len(panel.collections[0].get_offsets()) == 2


def test_the_papers_panels_come_first_and_all_share_their_axes() -> None:
    names = ["at", "mart", "at_awp", "unlabeled", "self_supervision"]
    runs = [moving(name, (0.5, 2.0), (1.0 + i, 1.5 + i)) for i, name in enumerate(names)]
    *panels, _ = trajectories_figure(make_models(*runs), title="t").axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["AT", "Self-supervision", "AT-AWP", "+Unlabeled", "MART"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert panels[0].get_xlim()[1] > 5.0
    assert panels[0].get_ylim()[1] > 5.5


def test_a_first_epoch_far_away_does_not_press_the_others_together() -> None:
    far = [(50.0, 90.0), *((1.0, 2.0) for _ in range(39))]
    panel, _ = trajectories_figure(make_models(moving("at", *far))).axes
    assert panel.get_xlim()[1] < 2.0
    assert panel.get_ylim()[1] < 3.0
    assert len(panel.collections[0].get_offsets()) == 40


def test_published_points_are_pale_behind_models_of_their_method() -> None:
    rows = [("at", 1.0, 1.66, 3.8), ("at", 0.0, 0.2, 1.7), ("unlabeled", 0.0, 0.2, math.nan)]
    published = pd.DataFrame(rows, columns=["method", "progress", FLATNESS, LOSS])
    runs = [moving(name, (0.5, 2.0), (1.0, 1.5)) for name in ("at", "unlabeled")]
    figure = trajectories_figure(make_models(*runs), published)
    at, unlabeled, _ = figure.axes
    pale = at.lines[0]
    assert (list(pale.get_xdata()), list(pale.get_ydata())) == ([0.2, 1.66], [1.7, 3.8])
    assert pale.get_zorder() < at.collections[0].get_zorder()
    assert at.get_ylim()[1] > 3.8
    assert len(unlabeled.lines) == len(at.lines) - 1
    assert "published (CIFAR-10)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_without_flatness_and_loss_there_are_no_trajectories() -> None:
    assert trajectories_figure(make_models()) is None
    assert trajectories_figure(models("at", trajectory=[{"epoch": 0, LOSS: 1.0}])) is None


def test_at_most_twenty_trajectories() -> None:
    runs = [moving(f"method{i}", (0.5, 2.0), (1.0, 1.5)) for i in range(22)]
    assert len(trajectories_figure(make_models(*runs)).axes) == 21
