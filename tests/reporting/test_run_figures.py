import math
from io import BytesIO

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_factory import make_run

from robust_flatness.plotting.method_labels import METHOD_LABELS
from robust_flatness.reporting.models import Model, group_models
from robust_flatness.reporting.run_figures import curves_figure, epochs_figure, rate_drops


def models(*methods: str, seeds: int = 1, **given) -> list[Model]:
    return group_models(
        make_run(method, seed, **given) for method in methods for seed in range(seeds)
    )


def line(axes: Axes, label: str):
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


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
    row = found[0].runs[0].trajectory[-1]
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
    losses, errors = curves_figure(group_models(runs)).axes
    stops = [found.get_xdata()[0] for found in losses.lines if "early" in found.get_label()]
    assert stops == [0.5, 0.75]
    level = errors.lines[-1].get_ydata()[0]
    expected = [runs[s].trajectory[s + 1]["test/robust_error"] for s in range(2)]
    assert level == pytest.approx(sum(expected) / 2)
    (losses, _) = curves_figure(models("at", early_stopped_epoch=None)).axes
    assert not [found for found in losses.lines if found.get_label() == "early stopping"]


def test_panels_share_their_axes_and_only_outer_ones_are_labelled() -> None:
    steep = [{"epoch": e, "test/robust_loss": 5.0 + e, "test/robust_error": 0.9} for e in range(4)]
    found = models(*list(METHOD_LABELS)[:6]) + models("other", trajectory=steep)
    figure = curves_figure(found)
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
    assert curves_figure([]) is None
    (nothing,) = models("at", trajectory=[{"epoch": 0, "train/robust_loss": 2.0}])
    assert curves_figure([nothing]) is None
    assert epochs_figure(nothing) is None
    # Losses alone are in `curves_figure`.
    (losses,) = models("at", trajectory=[{"epoch": 0, "test/robust_loss": 2.0}])
    assert epochs_figure(losses) is None


def test_all_measures_of_a_model_throughout_training() -> None:
    rates = (0.1, 0.1, 0.01, 0.01)
    rows = [row | {"train/learning_rate": r} for row, r in zip(make_run().trajectory, rates)]
    figure = epochs_figure(models("at", trajectory=rows)[0])
    (axes,) = figure.axes
    assert line(axes, "average-case flatness").get_ydata()[-1] == pytest.approx(4.1)
    assert line(axes, "test RLoss").get_ydata()[0] == pytest.approx(2.3)
    assert line(axes, "train RLoss").get_ydata()[-1] == pytest.approx(0.16)
    assert line(axes, "λ_max / 100").get_ydata()[-1] == pytest.approx(1.5)
    assert line(axes, "learning rate drops").get_xdata() == [0.5, 0.5]
    assert "worst-case flatness" not in texts(figure)
    assert figure.get_suptitle() == "AT"
    assert axes.get_ylim()[0] == 0
    assert size(figure) > 5_000


def test_worst_case_flatness_and_small_eigenvalues_are_drawn_as_they_are() -> None:
    names = ("test/robust_loss", "flatness/worst/test", "hessian/max_eigenvalue")
    rows = [{"epoch": e} | dict(zip(names, (2.0, 3.0 + e, 0.04))) for e in range(3)]
    (axes,) = epochs_figure(models("at", trajectory=rows, epochs=3)[0]).axes
    assert list(line(axes, "worst-case flatness").get_ydata()) == [3.0, 4.0, 5.0]
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
