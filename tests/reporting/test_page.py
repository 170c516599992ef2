import base64
import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from run_factory import EARLY_STOPPED, FINAL, make_models, make_run, read_models, write_run

from robust_flatness.reporting.figures import Figures
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.reporting.table1 import table1
from robust_flatness.run_folder import metrics
from robust_flatness.run_folder.files import Landscape
from robust_flatness.run_folder.metrics import Metric
from robust_flatness.run_folder.runs import LeftOut, load_run

EVIL = "<b>x</b></script><script>alert(1)</script>&amp;"
STEPS = np.linspace(-1, 1, 5)
FLATNESS, LOSS = "flatness/average/test", "test/robust_loss"


def settings(**model: object) -> dict[str, Any]:
    arguments = {"eps": 0.2, "num_classes": 10, **model}
    return {"model": {"class_path": "pkg.AT", "init_args": arguments}}


def some_models() -> Models:
    """AT with two seeds, TRADES at two strengths, and MART without worst-case flatness."""
    runs = [
        make_run("at", seed, final=FINAL | {"test/robust_error": error}, settings=settings())
        for seed, error in ((0, 0.52), (1, 0.56))
    ]
    for lam, flatness, loss in ((6.0, 2.0, 1.5), (9.0, 1.5, 1.2)):
        changed = {"flatness/average/test": flatness, "test/robust_loss": loss}
        changed |= {"test/robust_error": 0.4 + flatness / 100, "flatness/worst/test": loss}
        options = settings(lam=lam)
        runs.append(make_run("trades", final=FINAL | changed, settings=options, folder=f"t{lam}"))
    without = {name: value for name, value in FINAL.items() if name != "flatness/worst/test"}
    rows = [{"epoch": 0, "flatness/average/test": 1.0, "test/robust_loss": 2.0}]
    runs.append(make_run("mart", final=without, settings=settings(), trajectory=rows))
    return make_models(*runs)


def unpack(path: Path, name: str) -> str:
    page = path.read_text(encoding="utf-8")
    (packed,) = re.findall(rf'<script type="application/gzip" id="{name}">(.*?)</script>', page)
    return gzip.decompress(base64.b64decode(packed)).decode()


def read_payload(path: Path) -> dict[str, Any]:
    # A number that is not finite would be a name to Python, and an error to a browser.
    return json.loads(unpack(path, "payload"), parse_constant=pytest.fail)


def read_html(path: Path) -> str:
    """The page without what is compressed."""
    return re.sub(r'(?<=gzip")( id="\w+">).*?</script>', "", path.read_text(encoding="utf-8"))


def read_table(path: Path) -> dict[str, list[str]]:
    """Cells by label, texts as shown."""
    rows = re.findall(r"<tr class.*?</tr>", read_html(path), re.DOTALL)
    cells = [
        [re.sub(r"<[^>]*>", " ", c) for c in re.findall(r"<td.*?</td>", r, re.DOTALL)] for r in rows
    ]
    return {" ".join(row[0].split()): [" ".join(cell.split()) for cell in row[1:]] for row in cells}


def traces(figure: dict[str, Any], model: str | None = None) -> list[dict[str, Any]]:
    """Traces of models, of ours or of one of them."""
    return [
        trace
        for trace in figure["data"]
        if (meta := trace.get("meta")) and not meta["published"] and meta["model"] == model
    ]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    models = some_models()
    return write_page(tmp_path / "index.html", Figures(models, published_models()))


def test_points_are_the_means_of_the_models(page: Path) -> None:
    models, figures = some_models(), read_payload(page)["figures"]["relation"]
    figure = figures[f"{FLATNESS}|{LOSS}|final"]
    points = models.points(FLATNESS, LOSS)
    drawn = {t["name"]: list(zip(t["x"], t["y"])) for t in traces(figure)}
    assert drawn["TRADES"] == [(2.0, 1.5), (1.5, 1.2)]
    assert drawn["AT"] == [pytest.approx((points.at["AT", "x"], points.at["AT", "y"]))]
    early = traces(figures[f"{FLATNESS}|{LOSS}|early_stopped"])[0]
    assert early["y"] == [EARLY_STOPPED[LOSS]]
    (bars,) = [t["error_y"] for t in traces(figures[f"{FLATNESS}|test/robust_error|final"])][:1]
    assert bars["array"] == [pytest.approx(math.sqrt(2 * 0.02**2), rel=1e-4)]


def test_a_sweep_of_two_models_has_a_line_as_in_the_png(page: Path) -> None:
    view = read_payload(page)["figures"]["views"]["Hyper-parameters: a trend for each sweep"]
    (line,) = [t for t in view["data"] if t["mode"] == "lines" and not t["meta"]["published"]]
    assert (line["meta"]["method"], line["x"], line["y"]) == ("trades", [1.5, 2.0], [1.2, 1.5])


def test_own_methods_have_colours_of_their_own(page: Path) -> None:
    figure = read_payload(page)["figures"]["relation"][f"{FLATNESS}|{LOSS}|final"]
    colours = {trace["name"]: trace["marker"]["color"] for trace in traces(figure)}
    assert len(set(colours.values())) == len(colours) == 3


def test_hover_names_runs_differing_settings_eps_epochs_and_seeds(page: Path) -> None:
    hovers = read_payload(page)["hovers"]
    lines = hovers["run/final/AT"].split("<br>")
    assert lines[:2] == ["<b>AT</b>", "at-Digits-s0, at-Digits-s1"]
    assert "eps 0.2 · epochs 4 · seeds 0, 1" in lines
    assert "RErr (PGD), test: 54.0 % ± 2.8 %" in lines
    assert "RLoss, test − train: 1.74 ± 0.00" in lines
    assert "model.lam = 9" in hovers["run/final/TRADES lam=9"]
    assert "worst-case" not in hovers["run/final/MART"]
    assert hovers["published/final/TRADES λ=9"].split("<br>")[1] == "published (CIFAR-10)"


def test_diverged_runs_are_named(tmp_path: Path) -> None:
    run = replace(make_run(settings=settings()), diverged_epoch=2)
    path = write_page(tmp_path / "index.html", Figures(make_models(run)))
    assert "<dt>Diverged</dt><dd>at-Digits-s0 (from epoch 2)</dd>" in read_html(path)
    assert "diverged: at-Digits-s0 (from epoch 2)" in read_payload(path)["hovers"]["run/final/AT"]


def test_only_what_was_measured_can_be_chosen(tmp_path: Path) -> None:
    final = {FLATNESS: 1.0, LOSS: 2.0}
    models = make_models(make_run("at", final=final, early_stopped={}, settings=settings()))
    path = write_page(tmp_path / "index.html", Figures(models))
    figures, html = read_payload(path)["figures"], read_html(path)
    assert list(figures["relation"]) == [f"{FLATNESS}|{LOSS}|final"]
    assert list(figures["views"]) == []
    assert figures["landscapes"] == {}
    assert re.findall(r'<option value="([^"]*/[^"]*)">', html) == [FLATNESS, LOSS]
    assert read_table(path) == {"AT": ["1.00", "2.00"]}
    assert "Not measured in your runs: RErr (AutoAttack), test; " in html
    assert 'id="landscapes"' not in html


def test_table_has_means_deviations_and_groups(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", Figures(some_models()))
    table = read_table(path)
    assert list(table) == ["AT 2 seeds", "MART", "TRADES lam=6", "TRADES lam=9"]
    assert "54.0 ± 2.8" in table["AT 2 seeds"]
    assert "–" in table["MART"]
    html = read_html(path)
    assert (html.count('class="good"'), html.count('class="poor"')) == (1, 2)


def test_a_metric_that_is_registered_for_tables_is_a_column(tmp_path: Path, monkeypatch) -> None:
    entry = Metric("margin_for_page/mean", "mean margin", in_tables=True)
    monkeypatch.setitem(metrics._BY_NAME, entry.name, entry)
    measured = {"margin_for_page/mean/test": 0.125, "unregistered/test": 7.0}
    run = make_run("at", final=FINAL | measured)
    html = read_html(write_page(tmp_path / "index.html", Figures(make_models(run))))
    assert "mean margin, test" in html
    assert "unregistered" not in html
    assert "0.12" in read_table(tmp_path / "index.html")["AT"]


def test_groups_are_those_of_table_1_at_a_rounded_threshold(tmp_path: Path) -> None:
    # A share of 0.57, off by its last digit.
    errors = {"at": 0.5, "mart": 0.57 - 1e-16, "mish": 0.58, "silu": 0.6, "gelu": 0.7}
    runs = [make_run(name, final={"test/robust_error": x}) for name, x in errors.items()]
    models = make_models(*runs)
    good = table1(models).groups["good"]["model"]
    html = read_html(write_page(tmp_path / "index.html", Figures(models)))
    assert html.count('class="good"') == len(good)


def test_autoattack_of_early_stopped_weights_is_found_where_fit_logs_it(tmp_path: Path) -> None:
    final = FINAL | {"test/autoattack_error_early_stopped": 0.47}
    write_run(tmp_path / "at", make_run("at", final=final, early_stopped={}))
    path = write_page(tmp_path / "index.html", Figures(read_models(tmp_path)))
    assert "47.0" in read_table(path)["AT"]


def test_correlations_are_those_of_correlate(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", Figures(make_models(), published_models()))
    figure = read_payload(path)["figures"]["relation"][f"{FLATNESS}|{LOSS}|final"]
    assert re.match(
        r"Published \(CIFAR-10\): Pearson 0.85 \[.*\], Spearman 0.86 \[.*\]; of 28 .*, 74 models\.",
        figure["layout"]["meta"],
    )


def test_only_sweeps_have_a_trend(tmp_path: Path) -> None:
    title = "Hyper-parameters: a trend for each sweep"
    three = [
        make_run(
            "trades",
            settings=settings(lam=lam),
            folder=str(lam),
            final=FINAL | {FLATNESS: lam, LOSS: 1.0 + 2 * lam},
        )
        for lam in (1, 2, 3)
    ]
    path = write_page(tmp_path / "index.html", Figures(make_models(*three)))
    (line,) = [
        t for t in read_payload(path)["figures"]["views"][title]["data"] if t["mode"] == "lines"
    ]
    assert (line["x"], line["y"]) == ([1, 3], pytest.approx([3, 7]))
    others = [
        make_run("at", settings=settings(lam=lam, steps=lam), folder=str(lam)) for lam in (1, 2)
    ]
    path = write_page(tmp_path / "index.html", Figures(make_models(*others)))
    assert title not in read_payload(path)["figures"]["views"]


def test_arrows_point_to_the_early_stopped_weights(page: Path) -> None:
    figure = read_payload(page)["figures"]["views"]["Early stopping: RLoss"]
    (arrow,) = [t for t in traces(figure) if t["mode"] == "lines+markers" and "AT" in t["ids"][1]]
    assert arrow["ids"] == ["", "run/early_stopped/AT", ""]
    assert arrow["x"] == [FINAL[FLATNESS], EARLY_STOPPED[FLATNESS], None]


def test_settings_stand_in_the_table_where_labels_have_letters(tmp_path: Path) -> None:
    many = [settings(**{f"a_long_name_{i}": lam for i in range(20)}) for lam in (1, 2)]
    models = make_models(*(make_run("at", settings=options) for options in many))
    path = write_page(tmp_path / "index.html", Figures(models))
    assert [label[:20] for label in read_table(path)] == [
        "AT (a) a_long_name_0",
        "AT (b) a_long_name_0",
    ]
    about = read_payload(path)["hovers"]["run/final/AT (a)"].split("<br>")
    assert "… (20 settings differ)" in about


def test_curves_and_paths_are_means_over_seeds(tmp_path: Path) -> None:
    def rows(loss: float) -> list[dict[str, float]]:
        return [{"epoch": e, FLATNESS: e, LOSS: loss, "test/robust_error": 0.5} for e in (0, 3)]

    runs = [make_run("at", seed, trajectory=rows(1.0 + seed)) for seed in (0, 1)]
    path = write_page(tmp_path / "index.html", Figures(make_models(*runs)))
    figures = read_payload(path)["figures"]
    curve, stops = traces(figures["losses"][""], "AT")
    assert (curve["x"], curve["y"]) == ([0, 3], [1.5, 1.5])
    assert stops["x"] == [2, 2, None] * 2
    assert traces(figures["errors"][""], "AT")[0]["y"] == [0.5, 0.5]
    (way,) = traces(figures["paths"][""], "AT")
    assert (way["customdata"], way["x"], way["y"]) == ([0.25, 1.0], [0, 3], [1.5, 1.5])


def test_landscapes_are_means_of_random_and_the_highest_of_adversarial_directions(
    tmp_path: Path,
) -> None:
    factors = np.array([1.0, 3.0])[:, None, None]
    bowl = Landscape(STEPS, 1 + factors * np.ones((1, 1, 2)) * STEPS[None, :, None] ** 2)
    broken = Landscape(STEPS, np.where(STEPS[None, :, None] == 1, np.inf, bowl.losses))
    grid = Landscape(STEPS, 2 + STEPS[:, None, None] + 2 * np.ones((1, 5, 3)))
    landscapes = {"final/adversarial": bowl, "final/random": broken, "final/surface": grid}
    write_run(tmp_path / "at", make_run("at"), landscapes=landscapes)
    path = write_page(tmp_path / "index.html", Figures(read_models(tmp_path)))
    figures = read_payload(path)["figures"]["landscapes"]
    assert list(figures) == ["final/random", "final/adversarial", "final/surface|AT"]
    random, adversarial, surface = (traces(figure, "AT") for figure in figures.values())
    _, high, line = random
    assert line["y"] == pytest.approx(1 + 2 * STEPS[:-1] ** 2)  # up to the first infinity
    assert high["y"] == pytest.approx(1 + 3 * STEPS[:-1] ** 2)
    assert line["name"] == "AT, RErr 55.0 %"
    assert adversarial[2]["y"] == pytest.approx(1 + 3 * STEPS**2)
    axis = figures["final/random"]["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert (
        len([t for t in axis["tickvals"] if axis["range"][0] <= math.log10(t) <= axis["range"][1]])
        > 3
    )
    assert surface[0]["customdata"][0] == pytest.approx(STEPS + 4)  # along the horizontal axis


def test_the_schematic_is_a_figure_of_the_page(tmp_path: Path) -> None:
    bowl = Landscape(STEPS, 1 + 4 * np.ones((3, 1, 2)) * STEPS[None, :, None] ** 2)
    run = load_run(write_run(tmp_path / "at", make_run("at"), landscapes={"final/random": bowl}))
    models = make_models(run)
    path = write_page(tmp_path / "index.html", Figures(models))
    figure = read_payload(path)["figures"]["schematic"][""]
    assert "+4.00" in [note.get("text") for note in figure["layout"]["annotations"]]
    assert "its mean over 3 directions ν is 4.00, the average-case" in figure["layout"]["meta"]
    assert 'id="schematic"' in read_html(path)
    assert 'id="schematic"' not in read_html(write_page(path, Figures(make_models(make_run()))))


def test_page_loads_nothing_and_says_so_to_the_browser(page: Path) -> None:
    html = read_html(page)
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", html) == []
    assert not re.findall(r"https?://", html)
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html
    assert unpack(page, "plotly") == get_plotlyjs()
    assert page.stat().st_size < 5_000_000


def test_links_lead_to_the_files_of_the_report(tmp_path: Path) -> None:
    files = ["flatness", "curves"]
    path = write_page(tmp_path / "index.html", Figures(some_models()), files=files)
    links = set(re.findall(r'<a href="([^"]*)"', read_html(path)))
    tables = {"table1.csv", "table1.md", "table1.tex", "correlations.csv"}
    assert links == {"figures/flatness.pdf", "figures/curves.pdf"} | tables


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    a, b = (write_page(tmp_path / name, Figures(some_models())) for name in ("a.html", "b.html"))
    assert a.read_bytes() == b.read_bytes()


def test_names_stay_text(tmp_path: Path) -> None:
    models = make_models(make_run(EVIL, folder=EVIL))
    left_out = [LeftOut(Path("/home/me/runs/a"), EVIL)]
    path = write_page(tmp_path / "index.html", Figures(models), left_out=left_out, title=EVIL)
    html = read_html(path)
    assert "alert(1)</script>" not in html
    assert "<b>x" not in html
    payload = read_payload(path)
    texts = [*payload["hovers"].values()]
    for drawn in payload["figures"].values():
        for figure in drawn.values():
            texts += [
                trace.get(key, "") for trace in figure["data"] for key in ("name", "hovertemplate")
            ]
    assert sum("&lt;b&gt;x" in text for text in texts) > 3
    assert not any("<b>x" in text for text in texts)
    assert "<li>runs/a: &lt;b&gt;x" in html


def test_templates_inside_names_are_not_filled(tmp_path: Path) -> None:
    models = make_models(make_run("{{ plotly }}"))
    path = write_page(tmp_path / "index.html", Figures(models), title="{{ payload }}")
    assert "<h1>{{ payload }}</h1>" in read_html(path)


def test_heading_says_what_was_run(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", Figures(some_models()), title="My study")
    html = read_html(path)
    for text in ("My study", "5 (4 models, 3 methods)", "0, 1", "2 cores", "200 (AutoAttack)"):
        assert text in html
    empty = write_page(tmp_path / "empty.html", Figures(make_models(), published_models("table1")))
    assert "none that finished" in read_html(empty)
    assert len(read_table(empty)) == 19


def test_published_trajectories_need_both_metrics(tmp_path: Path) -> None:
    flat = pd.DataFrame([{"method": "flat", "progress": 1.0}])
    trajectories = pd.concat([published_trajectories(), flat])
    path = write_page(tmp_path / "index.html", Figures(make_models(), trajectories=trajectories))
    data = read_payload(path)["figures"]["paths"][""]["data"]
    assert [t["meta"]["method"] for t in data] == ["at", "at_awp", "self_supervision"]
    assert all(t["meta"]["published"] and t["customdata"][-1] == 1.0 for t in data)
