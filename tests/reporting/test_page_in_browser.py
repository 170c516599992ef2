"""The page as a reader uses it: opened from disk in Chromium, without network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_factory import FINAL, make_run, read_models, write_run

from robust_flatness.reporting.figures import Figures
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.run_folder.files import Landscape
from robust_flatness.run_folder.runs import LeftOut

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
EVIL = "<b>evil</b>"


def write_example(folder: Path) -> Path:
    """Two seeds of AT, two strengths of TRADES, MART without AutoAttack, and a wild name."""
    runs = [make_run("at", seed) for seed in (0, 1)]
    for lam in (6, 10):
        settings = {"model": {"class_path": "pkg.TRADES", "init_args": {"lam": lam}}}
        final = FINAL | {"test/autoattack_error": lam / 100, "flatness/average/test": lam / 5}
        runs.append(make_run("trades", final=final, settings=settings, folder=f"trades-{lam}"))
    final = {name: value for name, value in FINAL.items() if "autoattack" not in name}
    runs += [make_run("mart", final=final | {"flatness/average/test": 3.0}), make_run(EVIL)]
    steps = np.linspace(-1, 1, 5)
    landscapes = {
        "final/random": Landscape(steps, 1 + steps[None, :, None] ** 2 * np.ones((2, 1, 3)))
    }
    landscapes["final/surface"] = Landscape(steps, np.ones((5, 5, 2)))
    for index, run in enumerate(runs):
        name = run.folder.name if "<" not in str(run.folder) else "evil"
        write_run(folder / "runs" / name, run, landscapes=None if index else landscapes)
    return write_page(
        folder / "index.html",
        Figures(read_models(folder / "runs"), published_models(), published_trajectories()),
        left_out=[LeftOut(Path("runs/broken"), "results.json is broken")],
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str]]]:
    """The page, and what went wrong: errors, and whatever it asked for."""
    path = write_example(tmp_path_factory.mktemp("page"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.set_offline(True)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        local = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else wrong.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#relation_figure .main-svg")
        yield page, wrong
        browser.close()


@pytest.fixture
def page(opened: tuple[Any, list[str]]) -> Iterator[Any]:
    """The page with all methods on; a test fails if anything goes wrong in it."""
    page, wrong = opened
    page.click("#all_on")
    page.set_checked("#published", False)
    yield page
    assert wrong == []


def points(page: Any, figure: str) -> dict[str, list[float]]:
    """Horizontal places of runs by name; empty for a hidden figure."""
    return page.evaluate(
        "id => { const place = document.getElementById(`${id}_figure`);"
        "return place.hidden ? {} : Object.fromEntries(place.data"
        ".filter(t => t.meta && !t.meta.published && t.name).map(t => [t.name, [...t.x]])); }",
        figure,
    )


def labels(page: Any) -> list[str]:
    return page.eval_on_selector_all(
        "tbody tr:not([hidden]) .model > span", "all => all.map(s => s.firstChild.textContent)"
    )


def test_switching_a_method_off_takes_it_out_of_figures_and_table(page: Any) -> None:
    everywhere = ("relation", "paths", "views", "losses")
    assert all("AT" in points(page, figure) for figure in everywhere)
    page.uncheck('input[data-method="at"]')
    assert not any("AT" in points(page, figure) for figure in everywhere)
    assert "AT" not in labels(page)
    assert "TRADES lam=6" in labels(page)
    assert page.locator("#relation_figure .points path").count() == 4
    page.click("#all_off")
    assert points(page, "relation") == {}
    assert labels(page) == []
    messages = page.locator(".empty:visible").all_inner_texts()
    assert messages.count("No method is selected.") >= 4
    page.click("#all_on")
    assert page.locator("#relation_figure .points path").count() == 5


def test_published_points_switch_on_and_off(page: Any) -> None:
    assert len(labels(page)) == 5
    page.check("#published")
    assert len(labels(page)) == 5 + 74
    assert page.locator("#relation_figure .points path").count() == 5 + 74
    page.uncheck('input[data-method="at"]')
    assert page.locator("#relation_figure .points path").count() == 4 + 73


def test_published_rows_stand_below_ones_own_and_say_their_data(page: Any) -> None:
    own = labels(page)
    page.check("#published")
    assert labels(page)[: len(own)] == own
    page.locator("thead button", has_text="Model").click()
    assert set(labels(page)[: len(own)]) == set(own)
    small = page.eval_on_selector_all("tr.published small", "s => s.map(one => one.innerText)")
    assert small.count("published (CIFAR-10)") == 74
    names = page.evaluate("relation_figure.data.map(t => t.name)")
    assert "AT, published (CIFAR-10)" in names
    page.locator("thead button", has_text="RErr (AutoAttack), test, in %").click()


def test_models_of_one_method_have_strokes_of_their_own(page: Any) -> None:
    drawn = page.evaluate("paths_figure.data.filter(t => t.name.startsWith('TRADES'))")
    assert [trace["line"]["dash"] for trace in drawn] == ["solid", "dash"]


def test_slider_moves_the_trajectories_and_play_runs_to_the_end(page: Any) -> None:
    at_end = points(page, "paths")["AT"]
    page.fill("#progress", "50")
    assert points(page, "paths")["AT"] == at_end[:2]
    assert len(at_end) == 4
    assert page.inner_text("#progress_text") == "50 % of training"
    page.fill("#progress", "97")
    page.click("#play")
    page.wait_for_selector('#play[aria-label="Play"]')
    assert page.input_value("#progress") == "100"
    assert points(page, "paths")["AT"] == at_end


def test_a_click_on_a_column_sorts_by_numbers_and_a_dash_comes_last(page: Any) -> None:
    button = page.locator("thead button", has_text="RErr (AutoAttack), test, in %")
    header = page.locator("thead th", has_text="RErr (AutoAttack), test, in %")
    assert header.get_attribute("aria-sort") == "ascending"
    assert labels(page)[:2] == ["TRADES lam=6", "TRADES lam=10"]
    assert labels(page)[-1] == "MART"
    button.focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert labels(page)[-3:] == ["TRADES lam=10", "TRADES lam=6", "MART"]
    page.keyboard.press("Enter")  # the header keeps the focus
    assert header.get_attribute("aria-sort") == "ascending"


def test_hover_names_the_run(page: Any) -> None:
    point = page.locator("#relation_figure .trace", has=page.locator(".points path")).nth(1)
    page.locator("#relation_figure").scroll_into_view_if_needed()
    point.locator(".points path").first.hover(force=True)
    text = page.locator("#relation_figure .hoverlayer").text_content(timeout=3000)
    names = ("at-Digits-s0, at-Digits-s1", "trades-6", "mart-Digits-s0", "evil")
    assert any(name in text for name in names)
    assert "RLoss, test" in text


def test_no_button_sends_anything_away(page: Any) -> None:
    titles = page.eval_on_selector_all(
        ".modebar-btn", "buttons => buttons.map(b => b.getAttribute('data-title'))"
    )
    assert any("Download" in title for title in titles)
    assert not [title for title in titles if "loud" in title or "hare" in title or "Chart" in title]


def test_axes_and_correlation_follow_the_selectors(page: Any) -> None:
    before = points(page, "relation")["AT"], page.inner_text("#correlation")
    page.select_option("#x_axis", "flatness/worst/test")
    page.select_option("#y_axis", "test/autoattack_error")
    after = points(page, "relation")["AT"], page.inner_text("#correlation")
    assert after[0] == [7.5]
    assert before[0] == [4.1]
    assert before[1] != after[1]
    assert "RErr (AutoAttack), test, in %" in page.text_content("#relation_figure .ytitle")
    page.select_option("#x_axis", "flatness/average/test")
    page.select_option("#y_axis", "test/robust_loss")


def test_every_view_and_landscape_draws(page: Any) -> None:
    for figure, selector in (("views_figure", "#view"), ("landscapes_figure", "#landscape")):
        values = page.eval_on_selector_all(f"{selector} option", "o => o.map(one => one.value)")
        assert len(values) >= 2
        for value in values:
            page.select_option(selector, value)
            assert page.evaluate(f"{figure}.data.length") > 0, value
    page.check("#published")


def test_curves_are_of_the_models_chosen(page: Any) -> None:
    assert set(points(page, "losses")) == {"AT"}
    page.locator(".chips button", has_text="MART").click()
    page.locator(".chips button", has_text="lam=6").click()
    assert set(points(page, "losses")) == {"AT", "MART", "TRADES lam=6"}


def test_names_stay_text_and_what_was_left_out_is_said(page: Any) -> None:
    assert EVIL in labels(page)
    assert page.locator("aside b, tbody b").count() == 0
    assert "runs/broken: results.json is broken" in page.inner_text("#left_out")


def test_an_empty_column_is_hidden_and_the_table_fits(page: Any) -> None:
    published_only = page.locator("thead th", has_text="RErr (AutoAttack), train, in %")
    assert not published_only.is_visible()
    page.check("#published")
    assert published_only.is_visible()
    box = page.locator(".scroll")
    assert box.evaluate("box => box.scrollWidth") <= box.evaluate("box => box.clientWidth")


def test_a_dark_page_has_light_texts(page: Any) -> None:
    def colour(section: str) -> str:
        return page.evaluate(f"{section}_figure._fullLayout.font.color")

    assert colour("relation") == "#1c2430"
    page.emulate_media(color_scheme="dark")
    # The page hears of it a moment later.
    page.wait_for_timeout(500)
    dark = colour("relation"), colour("losses")
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(500)
    assert dark == ("#e4e7ec", "#e4e7ec")


def test_a_phone_sees_the_page_without_scrolling_sideways(page: Any) -> None:
    for width in (360, 390, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1400, "height": 1000})
