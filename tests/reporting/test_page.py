import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from run_factory import EARLY_STOPPED, FINAL, make_run, write_run

from robust_flatness.reporting.models import Model, group_models
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.reporting.runs import LeftOut, read_runs
from robust_flatness.run_folder.files import Landscape

EVIL = "<b>x</b></script><script>alert(1)</script>&amp;"
STEPS = np.linspace(-1, 1, 5)


def settings(**model: object) -> dict[str, Any]:
    arguments = {"eps": 0.2, "num_classes": 10, **model}
    return {"model": {"class_path": "pkg.AT", "init_args": arguments}}


def some_models() -> list[Model]:
    """AT with two seeds, TRADES at two strengths, and MART without worst-case flatness."""
    runs = [
        make_run("at", seed, final=FINAL | {"test/robust_error": error}, settings=settings())
        for seed, error in ((0, 0.52), (1, 0.56))
    ]
    for lam, flatness, loss in ((6.0, 2.0, 1.5), (9.0, 1.5, 1.2)):
        changed = {"flatness/average/test": flatness, "test/robust_loss": loss}
        changed |= {"test/robust_error": 0.4 + flatness / 100, "flatness/worst/test": loss}
        given = settings(lam=lam)
        runs.append(make_run("trades", final=FINAL | changed, settings=given, folder=f"t{lam}"))
    without = {name: value for name, value in FINAL.items() if name != "flatness/worst/test"}
    rows = [{"epoch": 0, "flatness/average/test": 1.0, "test/robust_loss": 2.0}]
    runs.append(make_run("mart", final=without, settings=settings(), trajectory=rows))
    return group_models(runs)


def read_data(path: Path) -> dict[str, Any]:
    page = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert "<" not in found[1]
    # A number that is none would be a name to Python, and an error to a browser.
    return json.loads(found[1], parse_constant=pytest.fail)


def without_plotly(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_data_are_the_means_of_the_models_with_errors_in_percent(tmp_path: Path) -> None:
    models = some_models()
    data = read_data(write_page(tmp_path / "index.html", models=models))
    assert [row["label"] for row in data["models"]] == [model.label for model in models]
    for row, model in zip(data["models"], models):
        for name in ("test/robust_loss", "flatness/average/test"):
            assert row["figures"]["final"][name][0] == pytest.approx(model.mean(name))
    at = data["models"][0]
    spread = 100 * math.sqrt(2 * 0.02**2)
    assert at["figures"]["final"]["test/robust_error"] == pytest.approx([54.0, spread], rel=1e-4)
    stopped = at["figures"]["early_stopped"]["test/robust_loss"][0]
    assert stopped == EARLY_STOPPED["test/robust_loss"]
    assert at["figures"]["final"]["gap/robust_loss"] == pytest.approx([1.9 - 0.16])
    assert at["figures"]["final"]["last_minus_best/robust_loss"] == pytest.approx([1.9 - 1.4])
    mart = next(row for row in data["models"] if row["method"] == "mart")
    assert "flatness/worst/test" not in mart["figures"]["final"]
    assert data["guessing"] == pytest.approx([math.log(10)], abs=1e-3)


def test_hover_names_runs_differing_settings_eps_epochs_and_seeds(tmp_path: Path) -> None:
    data = read_data(write_page(tmp_path / "index.html", models=some_models()))
    at, *_, trades = data["models"]
    assert at["about"][0] == "at-Digits-s0, at-Digits-s1"
    assert at["about"][-1] == "eps 0.2 · epochs 4 · seeds 0, 1"
    assert trades["label"] == "TRADES lam=9"
    assert "model.lam = 9" in trades["about"]


def test_diverged_runs_are_named(tmp_path: Path) -> None:
    run = replace(make_run(settings=settings()), diverged_epoch=2)
    path = write_page(tmp_path / "index.html", models=group_models([run]))
    assert "<dt>Diverged</dt><dd>at-Digits-s0 (from epoch 2)</dd>" in without_plotly(path)
    assert "diverged: at-Digits-s0 (from epoch 2)" in read_data(path)["models"][0]["about"]


def test_only_what_was_measured_can_be_chosen(tmp_path: Path) -> None:
    final = {"flatness/average/test": 1.0, "test/robust_loss": 2.0}
    models = group_models([make_run("at", final=final, early_stopped={}, settings=settings())])
    data = read_data(write_page(tmp_path / "index.html", models=models))
    assert (data["x"], data["y"]) == (["flatness/average/test"], ["test/robust_loss"])
    assert [column["label"] for column in data["columns"]] == ["Average flatness", "RLoss test"]
    assert "RErr test, AutoAttack" in data["unmeasured"]
    assert data["landscapes"] == {}
    assert not any(view["kind"] in ("trend", "kink") for view in data["views"])


def test_autoattack_of_early_stopped_weights_is_found_where_fit_logs_it(tmp_path: Path) -> None:
    final = FINAL | {"test/autoattack_error_early_stopped": 0.47}
    write_run(tmp_path / "at", make_run("at", final=final, early_stopped={}))
    models = group_models(read_runs(tmp_path)[0])
    data = read_data(write_page(tmp_path / "index.html", models=models))
    assert data["models"][0]["figures"]["early_stopped"] == {"test/autoattack_error": [47.0]}


def test_correlations_are_those_of_correlate(tmp_path: Path) -> None:
    published = published_models()
    data = read_data(write_page(tmp_path / "index.html", models=[], published=published))
    text = data["correlations"]["final"]["flatness/average/test test/robust_loss"]
    assert re.match(
        r"Published \(CIFAR-10\): Pearson 0.85 \[.*\], Spearman 0.86 \[.*\]; of 28 .*, 74 models\.",
        text,
    )


def test_published_models_say_that_they_are_of_cifar10(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", models=[], published=published_models())
    assert {row["about"][0] for row in read_data(path)["published"]} == {"published (CIFAR-10)"}


def test_models_of_one_method_are_numbered_and_only_sweeps_have_a_trend(tmp_path: Path) -> None:
    data = read_data(write_page(tmp_path / "index.html", models=some_models()))
    found = {row["label"]: (row["rank"], row["sweep"]) for row in data["models"]}
    assert (found["TRADES lam=6"], found["TRADES lam=9"]) == ((0, 0), (1, 0))
    assert found["AT"] == found["MART"] == (0, None)
    assert any(view["kind"] == "trend" for view in data["views"])
    others = [
        make_run("at", settings=settings(lam=lam, steps=lam), folder=str(lam)) for lam in (1, 2)
    ]
    data = read_data(write_page(tmp_path / "index.html", models=group_models(others)))
    assert not any(view["kind"] == "trend" for view in data["views"])


def test_settings_stand_in_the_table_where_labels_have_letters(tmp_path: Path) -> None:
    many = [settings(**{f"a_long_name_{i}": lam for i in range(20)}) for lam in (1, 2)]
    models = group_models([make_run("at", settings=given) for given in many])
    a, _ = read_data(write_page(tmp_path / "index.html", models=models))["models"]
    assert a["label"] == "AT (a)"
    assert a["settings"].startswith("a_long_name_0=1, a_long_name_1=1, ")
    assert a["about"][-2] == "… (20 settings differ)"
    assert len(a["about"]) < 20


def test_curves_and_paths_are_means_over_seeds(tmp_path: Path) -> None:
    def rows(loss: float) -> list[dict[str, float]]:
        return [
            {"epoch": epoch, "flatness/average/test": epoch, "test/robust_loss": loss}
            | {"test/robust_error": 0.5}
            for epoch in (0, 3)
        ]

    runs = [make_run("at", seed, trajectory=rows(1.0 + seed)) for seed in (0, 1)]
    data = read_data(write_page(tmp_path / "index.html", models=group_models(runs)))
    curves = data["models"][0]["curves"]
    assert curves["test/robust_loss"] == {"epoch": [0, 3], "value": [1.5, 1.5]}
    assert curves["test/robust_error"]["value"] == [50.0, 50.0]
    (path,) = data["trajectories"]
    assert (path["progress"], path["x"], path["y"]) == ([0.25, 1.0], [0, 3], [1.5, 1.5])


def test_landscapes_are_means_of_random_and_the_highest_of_adversarial_directions(
    tmp_path: Path,
) -> None:
    factors = np.array([1.0, 3.0])[:, None, None]
    bowl = Landscape(STEPS, 1 + factors * np.ones((1, 1, 2)) * STEPS[None, :, None] ** 2)
    broken = Landscape(STEPS, np.where(STEPS[None, :, None] == 1, np.inf, bowl.losses))
    grid = Landscape(STEPS, STEPS[:, None, None] + 2 * np.ones((1, 5, 3)))
    landscapes = {"final/adversarial": bowl, "final/random": broken, "final/surface": grid}
    write_run(tmp_path / "at", make_run("at"), landscapes=landscapes)
    models = group_models(read_runs(tmp_path)[0])
    found = read_data(write_page(tmp_path / "index.html", models=models))["landscapes"]
    assert list(found) == ["final/random", "final/adversarial", "final/surface"]
    (random,), (adversarial,), (surface,) = found.values()
    assert random["line"] == pytest.approx(1 + 2 * STEPS[:-1] ** 2)  # up to the first infinity
    assert random["high"] == pytest.approx(1 + 3 * STEPS[:-1] ** 2)
    assert adversarial["line"] == pytest.approx(1 + 3 * STEPS**2)
    assert surface["grid"][0] == pytest.approx(STEPS + 2)  # along the horizontal axis


def test_page_loads_nothing_and_says_so_to_the_browser(tmp_path: Path) -> None:
    page = without_plotly(write_page(tmp_path / "index.html", models=some_models()))
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", page) == []
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


def test_names_stay_text(tmp_path: Path) -> None:
    models = group_models([make_run(EVIL, folder=EVIL)])
    left_out = [LeftOut(Path("/home/me/runs/a"), EVIL)]
    path = write_page(tmp_path / "index.html", models=models, left_out=left_out, title=EVIL)
    page = without_plotly(path)
    assert "alert(1)</script>" not in page
    assert "<b>x" not in page
    data = read_data(path)
    assert data["models"][0]["method"] == EVIL
    assert data["left_out"] == [{"folder": "runs/a", "reason": EVIL}]


def test_slots_inside_names_are_not_filled(tmp_path: Path) -> None:
    models = group_models([make_run("{{plotly}}")])
    page = without_plotly(write_page(tmp_path / "index.html", models=models, title="{{data}}"))
    assert "<h1>{{data}}</h1>" in page


def test_heading_says_what_was_run(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", models=some_models(), title="My study")
    page = without_plotly(path)
    for text in ("My study", "5 (4 models, 3 methods)", "0, 1", "2 cores", "200 (AutoAttack)"):
        assert text in page
    empty = write_page(tmp_path / "empty.html", models=[], published=published_models("table1"))
    assert "none that finished" in without_plotly(empty)
    assert len(read_data(empty)["published"]) == 19


def test_pictures_are_embedded_and_must_exist(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    images = {"The <measure>": tmp_path / "a.png"}
    page = without_plotly(write_page(tmp_path / "index.html", models=[], images=images))
    assert 'src="data:image/png;base64,cG5n" alt="The &lt;measure&gt;"' in page
    with pytest.raises(ValueError, match=r"`images` to hold files that exist but got .*b\.png"):
        write_page(tmp_path / "index.html", models=[], images={"b": tmp_path / "b.png"})


def test_published_trajectories_need_both_figures(tmp_path: Path) -> None:
    trajectories = published_trajectories() | {"flat": [{"progress": 1.0}]}
    path = write_page(tmp_path / "index.html", models=[], trajectories=trajectories)
    paths = read_data(path)["trajectories"]
    assert {"at", "at_awp"} <= {path["method"] for path in paths}
    assert len(paths) == 3
    assert all(path["published"] and path["progress"][-1] == 1.0 for path in paths)
