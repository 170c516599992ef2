import dataclasses

import numpy as np
import pytest
from drawn import legend, names, scatters, slope
from matplotlib.colors import to_rgb
from run_factory import make_run

from robust_flatness.plotting.canvas import method_style
from robust_flatness.reporting.models import group_models
from robust_flatness.reporting.published import published_models
from robust_flatness.reporting.sweep_figure import hyperparameter_figure

FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"


def sweep(method="trades", values=(9.0, 1.0, 3.0), losses=(1.2, 2.2, 1.5)):
    return group_models(
        make_run(
            method,
            settings={"model": {"class_path": "pkg.M", "init_args": {"lam": value}}},
            final={FLATNESS: 0.5 * loss**2, LOSS: loss},
        )
        for value, loss in zip(values, losses)
    )


def test_a_sweep_has_shades_in_the_order_of_its_values_and_a_line() -> None:
    other = make_run("at", final={FLATNESS: 3.0, LOSS: 2.0})
    figure = hyperparameter_figure([*sweep()[::-1], *group_models([other])])
    axes = figure.axes[0]
    places = scatters(axes)
    losses = places["TRADES"][:, 1]
    assert losses == pytest.approx([2.2, 1.5, 1.2])  # lam = 1, 3, 9
    drawn = next(c for c in axes.collections if c.get_label() == "TRADES")
    lightness = drawn.get_facecolor()[:, :3].sum(axis=1)
    assert (np.diff(lightness) < 0).all()
    assert drawn.get_facecolor()[-1, :3] == pytest.approx(to_rgb(method_style("trades").colour))
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

    assert hyperparameter_figure(group_models([run(3, 64), run(5, 8)])) is None
    figure = hyperparameter_figure(group_models([run(3, 64), run(5, 64), run(9, 8)]))
    assert sorted(names(figure.axes[0])) == ["max_epochs=3", "max_epochs=5"]
    assert len(scatters(figure.axes[0])["AT"]) == 2


def test_methods_with_one_model_each_are_no_sweep() -> None:
    published = published_models()
    assert hyperparameter_figure([], published=published) is None
    assert hyperparameter_figure(sweep()[:1]) is None
    once = dataclasses.replace(sweep()[0], runs=(make_run("trades", final={LOSS: 1.0}),))
    assert hyperparameter_figure([once, *sweep()[:1]]) is None
