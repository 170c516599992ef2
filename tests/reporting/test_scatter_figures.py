import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from drawn import legend, lines, names, scatters, slope
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation
from run_factory import EARLY_STOPPED, FINAL, make_models, make_run

from robust_flatness.plotting.canvas import method_styles
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.figures import ERRORS, GAPS, PUBLISHED, Figures
from robust_flatness.reporting.matplotlib_figures import relation_figure, sweeps_figure
from robust_flatness.reporting.published import published_models
from robust_flatness.run_folder.metrics import METHOD_LABELS, method_label

FLATNESS, LOSS, ERROR = "flatness/average/test", "test/robust_loss", "test/robust_error"
RNG = np.random.default_rng(0)
FIGURES = {
    method: {
        FLATNESS: x,
        "flatness/average/train": 1.1 * x,
        LOSS: 1 + 0.4 * x + RNG.normal(0, 0.1),
        "train_eval/robust_loss": 0.2 + RNG.random(),
        ERROR: 0.4 + 0.05 * x + RNG.normal(0, 0.01),
    }
    for method, x in zip(METHOD_LABELS, RNG.uniform(0.5, 5, 19))
}
EARLY = {FLATNESS: 0.8, LOSS: 1.3}
RUNS = [make_run(method, final=figures, early_stopped=EARLY) for method, figures in FIGURES.items()]
MODELS = make_models(*RUNS)


def flatness_figure(models, x=FLATNESS, y=LOSS, published=None, title=None):
    relation = Figures(models, published).relation(x, y)
    return relation_figure(relation, published=bool(published), heading=True, title=title)


def kink_figure(models, title=None):
    return relation_figure(Figures(models).kink(ERRORS[1]), title=title)


def train_flatness_figure(models, title=None):
    return relation_figure(Figures(models).train_flatness(), title=title)


def gap_figure(models, title=None):
    return relation_figure(*(Figures(models).relation(FLATNESS, g) for g in GAPS), title=title)


def early_stopping_figure(models, title=None):
    return relation_figure(Figures(models).early_stopping(), title=title)


def hyperparameter_figure(models):
    return sweeps_figure(Figures(models))


def png(figure) -> int:
    file = BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_models_stand_at_their_means_in_the_look_of_their_method() -> None:
    axes = flatness_figure(MODELS).axes[0]
    found = scatters(axes, "method")
    assert set(found) == {method_label(method) for method in FIGURES}
    for method, figures in FIGURES.items():
        assert found[method_label(method)] == pytest.approx(
            np.array([[figures[FLATNESS], figures[LOSS]]])
        )
    drawn = {c.get_label(): c for c in axes.collections}
    assert drawn["MART"].get_facecolor()[0, :3] == pytest.approx(
        to_rgb(method_styles(MODELS.methods)["mart"].color)
    )
    assert axes.get_xlabel() == "average-case flatness, test (lower is flatter)"


def test_the_heading_holds_the_correlations_of_both() -> None:
    published = published_models()
    heading = flatness_figure(MODELS, published=published).axes[0].get_title(loc="left")
    ours, theirs = heading.split("\n")
    found = correlate(MODELS, FLATNESS, LOSS)
    low, high = found.spearman_interval
    assert ours.startswith(f"Pearson {found.pearson:.2f} [{found.pearson_interval[0]:.2f}, ")
    assert ours.endswith(f"Spearman {found.spearman:.2f} [{low:.2f}, {high:.2f}], 19 models")
    assert theirs.startswith("published (CIFAR-10): Pearson 0.85 [")
    assert theirs.endswith("74 models")


def test_two_methods_have_a_correlation_without_interval() -> None:
    models = make_models(
        *(
            make_run(method, final=figures, settings={"model": {"lam": place}})
            for place, (figures, method) in enumerate(zip(FIGURES.values(), ["at", "mart"] * 3))
        )
    )
    heading = flatness_figure(models).axes[0].get_title(loc="left")
    found = correlate(models, FLATNESS, LOSS)
    expected = f"Pearson {found.pearson:.2f}, Spearman {found.spearman:.2f}, {found.over}"
    assert heading == expected
    assert heading.endswith(", 6 models: too few for an interval")
    assert flatness_figure(make_models(RUNS[0])).axes[0].get_title(loc="left") == ""


def test_bars_are_a_standard_deviation_over_seeds() -> None:
    runs = [make_run(seed=s, final={FLATNESS: 1.0 + s, LOSS: 2.0}) for s in range(3)]
    axes = flatness_figure(make_models(*runs, *RUNS[1:4])).axes[0]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    segments = [bar.get_segments()[0] for bar in bars]
    assert len(segments) == 2  # along x and y, of the one model with several seeds
    assert segments[0] == pytest.approx(np.array([[1.0, 2.0], [3.0, 2.0]]))
    assert scatters(axes)["AT"][0] == pytest.approx([2.0, 2.0])


def test_published_models_are_faint_rings_that_the_axes_include() -> None:
    published = published_models()
    figure = flatness_figure(MODELS, published=published)
    axes = figure.axes[0]
    expected = published.points(FLATNESS, LOSS)[["x", "y"]].to_numpy()
    rings = scatters(axes)[PUBLISHED]
    assert sorted(map(tuple, rings)) == [
        pytest.approx(place) for place in sorted(map(tuple, expected))
    ]
    assert axes.get_ylim()[1] > expected[:, 1].max()
    assert legend(figure)[-1] == PUBLISHED
    rings = next(c for c in axes.collections if c.get_label() == PUBLISHED)
    assert len(rings.get_facecolor()) == 0
    # Those of early-stopped weights alone have no place among last weights.
    alone = flatness_figure(MODELS, published=published_models("robustbench"))
    assert PUBLISHED not in scatters(alone.axes[0])


def test_errors_are_in_percent() -> None:
    figure = flatness_figure(MODELS, "flatness/average/train", ERROR)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert all(text.get_text().endswith(" %") for text in axes.get_yticklabels())
    assert not any("%" in text.get_text() for text in axes.get_xticklabels())
    at = FIGURES["at"]
    assert scatters(axes)["AT"][0] == pytest.approx([at["flatness/average/train"], at[ERROR]])


def test_names_cover_neither_models_nor_each_other() -> None:
    figure = flatness_figure(MODELS)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= 15
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:index])
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
    centres = axes.transData.transform(np.concatenate(list(scatters(axes, "method").values())))
    assert not any(box.contains(*centre) for box in boxes for centre in centres)


def test_the_legend_names_the_methods_that_have_no_room() -> None:
    same = [make_run(method, final={FLATNESS: 1.0, LOSS: 1.5}) for method in METHOD_LABELS]
    figure = flatness_figure(make_models(*same))
    named = names(figure.axes[0])
    assert 0 < len(named) < 19
    assert sorted([*named, *legend(figure)]) == sorted(METHOD_LABELS.values())
    assert legend(flatness_figure(make_models(*RUNS[:2]))) == []


def test_a_legend_of_all_methods_fits_the_width() -> None:
    figure = gap_figure(MODELS)
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    box = drawn.get_window_extent()
    assert len(legend(figure)) == 19
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y0 >= 0
    assert all(axes.bbox.height > box.height for axes in figure.axes)


def test_kink_has_a_least_squares_line_on_either_side() -> None:
    axes = kink_figure(MODELS).axes[0]
    pairs = np.array([(figures[LOSS], figures[ERROR]) for figures in FIGURES.values()])
    kink = math.log(10)
    (guessing,) = lines(axes)["guessing (ln 10)"]
    assert guessing[:, 0] == pytest.approx([kink, kink])
    sides = pairs[pairs[:, 0] <= kink], pairs[pairs[:, 0] > kink]
    assert min(map(len, sides)) >= 3
    fitted = lines(axes)["least squares on either side"]
    for side, line in zip(sides, fitted, strict=True):
        expected, intercept = np.polyfit(*side.T, 1)
        assert slope(line) == pytest.approx(expected)
        assert line[0][1] == pytest.approx(intercept + expected * line[0][0])
        assert line[:, 0] == pytest.approx([side[:, 0].min(), side[:, 0].max()])


def test_kink_needs_three_models_for_a_line() -> None:
    many = [replace(run, num_classes=1000) for run in RUNS]
    axes = kink_figure(make_models(*many)).axes[0]
    assert len(lines(axes)["least squares on either side"]) == 1
    assert "least squares on either side" not in lines(kink_figure(make_models(*RUNS[:2])).axes[0])


def test_train_flatness_stands_above_test_flatness_with_the_diagonal() -> None:
    axes = train_flatness_figure(MODELS).axes[0]
    points = np.concatenate(list(scatters(axes, "method").values()))
    assert points[:, 1] == pytest.approx(1.1 * points[:, 0])
    (diagonal,) = axes.lines
    ends = axes.transData.inverted().transform(
        diagonal.get_transform().transform(diagonal.get_xydata())
    )
    assert ends[:, 0] == pytest.approx(ends[:, 1])


def test_gaps_are_test_minus_train_and_last_minus_best() -> None:
    figure = gap_figure(MODELS)
    for axes, other in zip(figure.axes, ("train", "best"), strict=True):
        for method, figures in FIGURES.items():
            less = figures["train_eval/robust_loss"] if other == "train" else EARLY[LOSS]
            expected = [figures[FLATNESS], figures[LOSS] - less]
            assert scatters(axes)[method_label(method)][0] == pytest.approx(expected)


def test_gaps_are_paired_by_seed() -> None:
    def run(seed, loss, best):
        early = {} if best is None else {LOSS: best}
        return make_run(seed=seed, final={FLATNESS: 1.0, LOSS: loss}, early_stopped=early)

    figure = gap_figure(make_models(run(0, 2.0, 1.5), run(1, 3.0, 2.3), run(2, 9.0, None)))
    (axes,) = figure.axes  # without training loss there is no first panel
    assert scatters(axes)["AT"][0] == pytest.approx([1.0, 0.6])
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    segment = bars[-1].get_segments()[0]
    assert segment[1, 1] - segment[0, 1] == pytest.approx(2 * np.std([0.5, 0.7], ddof=1))


def test_arrows_go_from_the_last_to_the_early_stopped_model() -> None:
    stay = make_run("gelu", final=EARLY, early_stopped=EARLY)
    without = make_run("mish", final=FINAL, early_stopped={LOSS: 1.0})
    moved = make_run("at", final=FINAL, early_stopped=EARLY_STOPPED)
    figure = early_stopping_figure(make_models(stay, without, moved))
    axes = figure.axes[0]
    arrows = [t for t in axes.texts if isinstance(t, Annotation) and t.arrow_patch is not None]
    ((start, end),) = [(arrow.xyann, arrow.xy) for arrow in arrows]
    assert start == (FINAL[FLATNESS], FINAL[LOSS])
    assert end == (EARLY_STOPPED[FLATNESS], EARLY_STOPPED[LOSS])
    assert set(scatters(axes, "method")) == {"AT", "GeLU"}
    assert legend(figure) == ["last weights", "early-stopped weights"]
    low, high = axes.get_xlim()
    assert low < EARLY[FLATNESS]
    assert high > FINAL[FLATNESS]


DRAW = (
    flatness_figure,
    kink_figure,
    train_flatness_figure,
    gap_figure,
    early_stopping_figure,
)


@pytest.mark.parametrize("draw", DRAW)
def test_without_anything_to_draw_there_is_no_figure(draw) -> None:
    assert draw(make_models()) is None
    assert draw(make_models(*(make_run(m, final={}, early_stopped={}) for m in "ab"))) is None


@pytest.mark.parametrize("draw", DRAW)
def test_every_figure_can_be_saved_for_one_model(draw) -> None:
    figure = draw(make_models(make_run()), title="Digits")
    assert png(figure) > 5_000
    for axes in figure.axes:
        points = np.concatenate(list(scatters(axes).values()))
        assert np.isfinite(points).all()
        assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()


def sweep(method="trades", values=(9.0, 1.0, 3.0), losses=(1.2, 2.2, 1.5)):
    return [
        make_run(
            method,
            settings={"model": {"class_path": "pkg.M", "init_args": {"lam": value}}},
            final={FLATNESS: 0.5 * loss**2, LOSS: loss},
        )
        for value, loss in zip(values, losses)
    ]


def test_a_sweep_has_shades_in_the_order_of_its_values_and_a_line() -> None:
    other = make_run("at", final={FLATNESS: 3.0, LOSS: 2.0})
    figure = hyperparameter_figure(make_models(*sweep(), other))
    axes = figure.axes[0]
    places = scatters(axes)
    losses = places["TRADES"][:, 1]
    assert losses == pytest.approx([2.2, 1.5, 1.2])  # lam = 1, 3, 9
    drawn = next(c for c in axes.collections if c.get_label() == "TRADES")
    lightness = drawn.get_facecolor()[:, :3].sum(axis=1)
    assert (np.diff(lightness) < 0).all()
    assert drawn.get_facecolor()[-1, :3] == pytest.approx(
        to_rgb(method_styles(["at", "trades"])["trades"].color)
    )
    (line,) = [line.get_xydata() for line in axes.lines]
    assert slope(line) == pytest.approx(np.polyfit(0.5 * losses**2, losses, 1)[0])
    assert set(places) == {"TRADES"}  # other models do not appear
    assert sorted(names(axes)) == ["lam=1", "lam=3", "lam=9"]
    assert legend(figure) == ["TRADES"]


def test_many_models_are_named_at_the_ends_of_their_sweep() -> None:
    figure = hyperparameter_figure(published_models())
    axes = figure.axes[0]
    named = names(axes)
    assert "ξ=0.001" in named
    assert "ξ=0.005" not in named
    assert scatters(axes)["TRADES"].shape == (4, 2)
    assert scatters(axes)["Weight decay"][0] == pytest.approx([2.53, 4.17])  # no weight decay


def test_models_that_were_measured_otherwise_are_no_sweep() -> None:
    def run(epochs, images):
        settings = {"trainer": {"max_epochs": epochs}, "autoattack": {"num_examples": images}}
        final = {FLATNESS: epochs, LOSS: 1.0 + epochs}
        return make_run("at", settings=settings, final=final, folder=f"at-{epochs}")

    assert hyperparameter_figure(make_models(run(3, 64), run(5, 8))) is None
    figure = hyperparameter_figure(make_models(run(3, 64), run(5, 64), run(9, 8)))
    assert sorted(names(figure.axes[0])) == ["max_epochs=3", "max_epochs=5"]
    assert len(scatters(figure.axes[0])["AT"]) == 2


def test_methods_with_one_model_each_are_no_sweep() -> None:
    assert hyperparameter_figure(make_models()) is None
    assert hyperparameter_figure(make_models(*sweep()[:1])) is None
    # The other model of the method has no flatness.
    loss = make_run("trades", final={LOSS: 1.0}, settings={"model": {"lam": 2.0}})
    assert hyperparameter_figure(make_models(*sweep()[:1], loss)) is None
