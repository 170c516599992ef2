from pathlib import Path

import numpy as np
import pytest
from run_factory import FINAL, make_models, make_run, write_run

from robust_flatness.reporting import matplotlib_figures
from robust_flatness.reporting.figures import Figures
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.matplotlib_figures import schematic_figure
from robust_flatness.run_folder.files import Landscape
from robust_flatness.run_folder.runs import Run, load_run

STEPS = np.linspace(-1, 1, 9)


def bowl(height: float, directions: int = 3) -> Landscape:
    """Directions of curvature 1, 2, …"""
    factors = np.arange(1, directions + 1)[:, None, None]
    return Landscape(STEPS, height + factors * np.ones((1, 1, 2)) * STEPS[None, :, None] ** 2)


def read(tmp_path: Path, *runs) -> Models:
    """Models of pairs of a run and its landscapes."""
    folders = [
        write_run(tmp_path / f"run{i}", run, landscapes=landscapes)
        for i, (run, landscapes) in enumerate(runs)
    ]
    return make_models(*map(load_run, folders))


def landscapes_figure(models: Models, **options):
    return matplotlib_figures.landscapes_figure(Figures(models), **options)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_lines_of_models_with_their_errors_beside_them(tmp_path: Path) -> None:
    both = {"final/random": bowl(1.0), "final/adversarial": bowl(2.0)}
    models = read(
        tmp_path,
        (
            make_run("mart", 0, final=FINAL | {"test/robust_error": 0.4}),
            {"final/random": bowl(0.5)},
        ),
        (make_run("at", 0, final=FINAL | {"test/robust_error": 0.5}), both),
        (make_run("at", 1, final=FINAL | {"test/robust_error": 0.6}), {"final/random": bowl(9.0)}),
        (make_run("silu", 0), None),
    )
    figure = landscapes_figure(models, title="t")
    random, adversarial, table = figure.axes
    lines = {line.get_label(): line for line in random.lines if line.get_label()[0] != "_"}
    assert list(lines) == ["AT", "MART"]
    # The mean over directions and seeds.
    assert lines["AT"].get_ydata() == pytest.approx(5.0 + 2 * STEPS**2)
    assert lines["AT"].get_xdata() == pytest.approx(STEPS)
    assert lines["MART"].get_ydata() == pytest.approx(0.5 + 2 * STEPS**2)
    highest = adversarial.lines[0]
    assert highest.get_ydata() == pytest.approx(2.0 + 3 * STEPS**2)
    assert highest.get_color() == lines["AT"].get_color()
    assert random.get_yscale() == "log"
    assert random.get_ylim() == adversarial.get_ylim()
    assert random.get_ylim()[1] < 15
    cells = texts(table)
    assert cells[cells.index("AT") :] == ["AT", "55.0", "55.0", "MART", "55.0", "40.0"]
    assert cells[:3] == ["test RErr in %", "AutoAttack", "PGD"]
    strokes = [line.get_color() for line in table.lines]
    assert strokes == [lines["AT"].get_color(), lines["MART"].get_color()]


def test_a_seed_without_landscapes_is_passed_over(tmp_path: Path) -> None:
    models = read(
        tmp_path, (make_run("at", 0), None), (make_run("at", 1), {"final/random": bowl(1.0)})
    )
    panel, _ = landscapes_figure(models).axes
    assert panel.lines[0].get_ydata()[4] == pytest.approx(1.0)


def test_what_was_not_measured_is_a_dash_or_no_column(tmp_path: Path) -> None:
    land = {"final/random": bowl(1.0)}
    with_both = {"test/robust_error": 0.5, "test/autoattack_error": 0.0}
    runs = (make_run("at", final=with_both), land), (make_run("mart", final={}), land)
    *_, table = landscapes_figure(read(tmp_path / "both", *runs)).axes
    assert texts(table)[-6:] == ["AT", "0.0", "50.0", "MART", "–", "–"]
    *_, table = landscapes_figure(read(tmp_path / "none", runs[1])).axes
    assert texts(table) == ["MART"]


def test_twelve_models_at_most_that_all_look_different(tmp_path: Path) -> None:
    def run(method: str, batch_size: int = 64):
        data = {"init_args": {"batch_size": batch_size}}
        return make_run(method, settings={"data": data}), {"final/random": bowl(1.0, 1)}

    methods = ["silu", "gelu", "cyclic", "weight_decay", "mish", "at_awp", "trades", "mart", "at"]
    models = read(
        tmp_path, *map(run, [*methods, "label_noise", "unlabeled"]), run("at", 8), run("late")
    )
    panel, table = landscapes_figure(models).axes
    drawn = [line.get_label() for line in panel.lines if line.get_label()[0] != "_"]
    assert len(drawn) == len(table.lines) == 12
    assert drawn[:6] == ["AT batch_size=64", "MART", "TRADES", "AT-AWP", "MiSH", "AT batch_size=8"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in table.lines}
    assert len(looks) == 12


def test_losses_are_cut_at_fifteen(tmp_path: Path) -> None:
    steep = Landscape(STEPS, 1 + 500 * np.ones((1, 1, 1)) * STEPS[None, :, None] ** 2)
    models = read(tmp_path, (make_run(), {"final/random": steep}))
    assert landscapes_figure(models).axes[0].get_ylim()[1] == 15


def test_nothing_to_draw_is_no_figure(tmp_path: Path) -> None:
    broken = Landscape(STEPS, np.full((1, 9, 2), np.nan))
    models = read(
        tmp_path,
        (make_run("at"), None),
        (make_run("mart"), {"early_stopped/random": bowl(1.0)}),
        (make_run("silu"), {"final/random": broken}),
    )
    assert landscapes_figure(models) is None
    assert landscapes_figure(make_models()) is None


# An even number of steps, none of which is 0.
EVEN_STEPS = np.linspace(-1, 1, 8)


def measured(tmp_path: Path, landscape: Landscape | None, name: str = "final/random") -> Run:
    found = None if landscape is None else {name: landscape}
    return load_run(write_run(tmp_path / "run", make_run("at_awp"), landscapes=found))


def slopes(*factors: float) -> Landscape:
    """Directions along which the loss is 5 + factor · s for each of two images."""
    lines = 5.0 + np.array(factors)[:, None] * EVEN_STEPS
    return Landscape(EVEN_STEPS, np.repeat(lines[:, :, None], 2, axis=2))


def test_the_height_of_a_typical_direction_is_marked(tmp_path: Path) -> None:
    figure = schematic_figure(measured(tmp_path, slopes(1.0, 4.0, 2.0)))
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
    figure = schematic_figure(measured(tmp_path, slopes(1.0)))
    assert "RLoss(w + ν) − RLoss(w) = 1.00" in figure.axes[0].texts[-1].get_text()


@pytest.mark.parametrize(
    ("landscape", "name"),
    [
        (None, ""),
        (slopes(1.0), "early_stopped/random"),
        (slopes(1.0), "final/adversarial"),
        (Landscape(0.75 * EVEN_STEPS - 0.25, np.ones((2, 8, 2))), "final/random"),
        (Landscape(0.75 * EVEN_STEPS + 0.25, np.ones((2, 8, 2))), "final/random"),
        (Landscape(EVEN_STEPS, np.full((2, 8, 2), np.inf)), "final/random"),
    ],
)
def test_without_a_landscape_from_end_to_end_there_is_no_figure(
    tmp_path: Path, landscape: Landscape | None, name: str
) -> None:
    assert schematic_figure(measured(tmp_path, landscape, name)) is None
