import csv
import io
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console
from run_factory import EARLY_STOPPED, FINAL, make_models, make_run

from robust_flatness.reporting.frame import Models, metric_values
from robust_flatness.reporting.published import published_models
from robust_flatness.reporting.table1 import COLUMNS, table1, terminal_table, write_table

FLATNESS = "flatness/average/test"
AA, PGD = "test/autoattack_error", "test/robust_error"


def paper(*rows) -> Models:
    """Published rows of method, label and test RErr."""
    index = pd.Index([label for _, label, _ in rows], name="label")
    frame = pd.DataFrame({"method": [method for method, *_ in rows]}, index=index)
    return Models(frame, metric_values((label, {AA: error}, {}, {}) for _, label, error in rows))


def run(method, error, seed=0, *, attack=AA, **options):
    final = {name: value for name, value in FINAL.items() if name not in (AA, PGD)}
    stopped = {name: value for name, value in EARLY_STOPPED.items() if name not in (AA, PGD)}
    final, stopped = final | {attack: error}, stopped | {attack: error / 2}
    return make_run(method, seed, final=final, early_stopped=stopped, **options)


def of(*runs, published=None):
    return table1(make_models(*runs), published)


def rows(table, key) -> dict[str, float]:
    return table.frame[key].dropna().to_dict()


def five(attack=AA, seeds=(0,)):
    errors = {"at": 0.6, "trades": 0.4, "mart": 0.5, "at_awp": 0.45, "mish": 0.55}
    return [run(name, e + 0.01 * s, s, attack=attack) for name, e in errors.items() for s in seeds]


def written(table, folder) -> dict[str, str]:
    return {path.suffix: path.read_text(encoding="utf-8") for path in write_table(table, folder)}


def records(table, folder) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written(table, folder)[".csv"])))


def printed(table, width=100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(table, width))
    return console.file.getvalue()


def test_groups_of_the_papers_own_rows_are_the_papers():
    table1_of_paper = published_models("table1")

    def replica(label, method):
        final = {n: table1_of_paper.mean(label, n) for n in (AA, "flatness/average/test")}
        stopped = {AA: table1_of_paper.mean(label, AA, "early_stopped")}
        return make_run(method, final=final, early_stopped=stopped)

    table = of(*(replica(*row) for row in table1_of_paper.frame["method"].items()))
    assert table.thresholds == (0.57, 0.60)
    sizes = {name: len(group) for name, group in table.groups.items()}
    assert sizes == {"good": 7, "average": 5, "poor": 7}
    means = [table.means(group) for group in table.groups.values()]
    expected = {
        "test_robust_error": [54.3, 58.7, 61.0],
        "early_stopped_robust_error": [53.6, 56.0, 54.4],
    }
    for key, errors in expected.items():
        assert [round(100 * group[key], 1) for group in means] == errors
    flatness = [group["average_flatness"] for group in means]
    assert flatness == pytest.approx([0.40, 0.69, 1.21], abs=0.01)


def test_rows_are_sorted_by_test_error_and_grouped():
    table = of(*five())
    assert list(table.frame["method"]) == ["trades", "at_awp", "mart", "mish", "at"]
    assert table.thresholds == (0.46, 0.54)
    assert [len(group) for group in table.groups.values()] == [2, 1, 2]


@pytest.mark.parametrize("errors", [[0.5, 0.4, 0.6], [0.5, 0.5, 0.5, 0.5, 0.9]])
def test_few_rows_or_close_ones_are_one_group(errors):
    table = of(*(run(f"m{index}", error) for index, error in enumerate(errors)))
    assert list(table.groups) == ["all"]
    assert table.thresholds is None
    assert "percentiles" not in " ".join(table.notes)


def test_cells_are_means_and_deviations_over_seeds(tmp_path):
    table = of(*(run("at", error, seed) for seed, error in enumerate([0.5, 0.52, 0.6])))
    (row,) = table.frame.to_dict("records")
    key = "test_robust_error"
    assert row[f"{key}_n"] == 3
    assert (row[f"{key}_attack"], row[f"{key}_images"]) == ("AutoAttack", 200)
    assert row[f"{key}_mean"] == pytest.approx(0.54)
    assert row[f"{key}_sd"] == pytest.approx(math.sqrt((0.04**2 + 0.02**2 + 0.06**2) / 2))
    for part in ("mean", "sd"):
        assert row[f"early_stopped_robust_error_{part}"] == pytest.approx(row[f"{key}_{part}"] / 2)
    assert row["train_robust_error_attack"] == "PGD"
    assert "| 54.0 ± 5.3" in re.sub(" +", " ", written(table, tmp_path)[".md"])


def test_one_seed_has_no_deviation(tmp_path):
    table = of(run("at", 0.5))
    assert "±" not in written(table, tmp_path)[".md"].split("- Mean")[0]
    assert records(table, tmp_path)[0]["test_robust_error_sd"] == ""


def test_a_figure_of_fewer_seeds_says_of_how_many(tmp_path):
    other = make_run("at", 2, final={PGD: 0.1}, early_stopped={})
    table = of(run("at", 0.5, 0), run("at", 0.6, 1), other)
    assert "55.0 ± 7.1 (n=2)" in written(table, tmp_path)[".md"]
    (record,) = records(table, tmp_path)
    assert (record["seeds"], record["test_robust_error_n"]) == ("3", "2")


def test_diverged_runs_are_named(tmp_path):
    broken = replace(make_run("at", 1, final={AA: 1.0}, early_stopped={}), diverged_epoch=3)
    table = of(run("at", 0.5), broken, run("mart", 0.6))
    sentence = "Diverged: at-Digits-s1 (from epoch 3); means leave out what is not finite there."
    assert sentence in table.notes
    assert "Diverged" in written(table, tmp_path)[".md"]
    assert " ".join(sentence.split()) in " ".join(printed(table).split())
    assert not any("Diverged" in note for note in of(run("at", 0.5)).notes)


def test_what_was_not_measured_is_a_dash(tmp_path):
    table = of(
        make_run(final={PGD: 0.5}, early_stopped={}), make_run("mart", final={}, early_stopped={})
    )
    assert list(table.groups) == ["all", "without RErr"]
    rows = [line for line in written(table, tmp_path)[".md"].splitlines() if "| MART" in line]
    assert re.sub("[| ]+", " ", rows[0]).split() == ["MART", *"––––––", "1"]
    record = records(table, tmp_path)[1]
    assert (record["worst_flatness_mean"], record["worst_flatness_n"]) == ("", "0")


def test_attack_of_a_column_is_named_and_never_silently_mixed(tmp_path):
    pure = written(of(*five()), tmp_path)[".md"]
    assert "test RErr (AA, %)" in pure
    assert "†" not in pure
    assert "test RErr (PGD, %)" in written(of(*five(PGD)), tmp_path)[".md"]
    mixed = of(*five(), run("silu", 0.41, attack=PGD))
    text = written(mixed, tmp_path)[".md"]
    assert "test RErr (AA or †PGD, %)" in text
    assert "early-stopped RErr (AA or †PGD, %)" in text
    marked = [line for line in text.splitlines() if "†" in line and line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in marked] == ["SiLU"]
    means = mixed.means(next(iter(mixed.groups.values())))
    assert "test_robust_error" not in means
    assert "clean_error" in means
    attacks = {row["model"]: row["test_robust_error_attack"] for row in records(mixed, tmp_path)}
    assert (attacks["SiLU"], attacks["AT"]) == ("PGD", "AutoAttack")
    assert "41.0†" in printed(mixed)


def test_the_papers_figures_stand_beside_the_same_method(tmp_path):
    table = of(*five(), run("my_method", 0.5), published=published_models("table1"))
    shown = table.frame.filter(like="paper_").loc["AT"].to_dict()
    assert shown == {
        "paper_test_robust_error": 0.628,
        "paper_train_robust_error": 0.107,
        "paper_average_flatness": 1.21,
        "paper_worst_flatness": 6.48,
        "paper_early_stopped_robust_error": 0.546,
    }
    text = written(table, tmp_path)[".md"]
    assert "paper, CIFAR-10: train RErr (AA, %)" in text
    assert "paper, CIFAR-10: clean error" not in text
    by_model = {row["model"]: row for row in records(table, tmp_path)}
    assert by_model["AT"]["paper_test_robust_error"] == "0.628"
    assert by_model["my_method"]["paper_test_robust_error"] == ""
    assert "paper" not in written(of(run("my_method", 0.5)), tmp_path)[".md"].split("\n- ")[0]


def sweep(method, name, values):
    return [run(method, 0.5, settings={"model": {"init_args": {name: value}}}) for value in values]


@pytest.mark.parametrize(
    ("method", "name", "values", "expected"),
    [
        ("trades", "lam", [3.0, 6.0, 9.0], {"TRADES lam=6"}),
        ("trades", "lam", [3.0, 9.0], set()),
        ("trades", "lam", [9.0], {"TRADES"}),
        ("trades", "other", [6.0, 9.0], set()),
        ("at", "lr", [0.05, 0.1], set()),
    ],
)
def test_of_several_models_only_the_papers_own_setting_is_its(method, name, values, expected):
    table = of(*sweep(method, name, values), published=published_models("table1"))
    key = "paper_test_robust_error"
    assert set(rows(table, key) if key in table.frame else ()) == expected


def test_a_model_of_a_class_leaves_the_rows_place_to_the_row():
    other = run("AT", 0.5, settings={"model": {"init_args": {"activation": "silu"}}})
    table = of(*five(), other, published=published_models("table1"))
    (label,) = (label for label in table.frame.index if "silu" in label)
    errors = rows(table, "paper_test_robust_error")
    assert 0.628 in errors.values()
    assert label not in errors
    assert "here AT is at" in " ".join(table.notes)


def test_among_several_published_rows_the_label_decides():
    published = paper(*(("trades", f"TRADES lam={lam}", lam / 10) for lam in (3, 6)))
    table = of(*sweep("trades", "lam", [3.0, 9.0]), published=published)
    assert rows(table, "paper_test_robust_error") == {"TRADES lam=3": 0.3}
    assert not of(run("trades", 0.5), published=published).published


def test_notes_state_thresholds_images_and_the_baseline():
    text = " ".join(of(*five(seeds=(0, 1, 2)), published=published_models("table1")).notes)
    assert "good below 47 % test RErr, poor from 55 %" in text
    assert "57 % and 60 %, with AT at 62.8 %; here AT is at 61.0 %." in text
    assert "all else is on Digits" in text
    assert "Images: 200 for test RErr, train RErr" in text


def test_markdown_is_aligned_and_escapes(tmp_path):
    text = written(of(*five(), run("a|b_c", 0.3)), tmp_path)[".md"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert r"a\|b\_c" in text
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(COLUMNS) + 3}
    assert re.match(r"\| \*\*good \(< \d+ %\)\*\* ", lines[2])


def test_latex_is_a_fragment_with_escapes_and_rules_between_groups(tmp_path):
    names = ["100%_a&b", "larger_eps", "late_multi_step"]
    extra = [run(name, 0.3) for name in names]
    table = of(*five(seeds=(0, 2)), *extra, published=published_models("table1"))
    text = written(table, tmp_path)[".tex"]
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{l*{12}{r}}"
    assert body[1] == r"\toprule"
    assert body[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert body.count(r"\midrule") == len(table.groups) == 3
    assert r"100\%\_a\&b & 30.0" in text
    assert r"Larger $\varepsilon$ &" in text
    assert r"``Late'' multi-step &" in text
    assert r"$\pm$" in text
    assert re.search(r"\\textbf\{poor \(\$\\geq\$ \d+ \\%\)\} & ", text)
    for line in body:
        assert line.isascii()
        assert line.count("{") == line.count("}")
        if line.endswith(r" \\") and "multicolumn" not in line:
            cells = re.findall(r"(?<!\\)&", line)
            assert len(cells) == 12


def test_csv_has_full_numbers(tmp_path):
    rows = records(of(*five(seeds=(0, 1, 2))), tmp_path)
    assert [row["group"] for row in rows] == ["good", "good", "average", "poor", "poor"]
    assert [row["method"] for row in rows] == ["trades", "at_awp", "mart", "mish", "at"]
    assert float(rows[0]["test_robust_error_mean"]) == pytest.approx(0.41, abs=1e-12)
    assert float(rows[0]["worst_flatness_mean"]) == 7.5
    assert rows[0]["test_robust_error_images"] == "200"
    assert rows[0]["data"] == "Digits"


def test_terminal_table_fits_into_100_columns():
    methods = ["weight_averaging", "late_multi_step", "self_supervision", "at", "mart"]
    runs = [run(name, 0.5 + 0.1 * s, s) for name in methods for s in range(3)]
    text = printed(of(*runs, published=published_models("table1")))
    assert max(map(len, text.splitlines())) <= 100
    assert "“Late” multi-step " in text
    assert "60.0±10.0" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 60, 50])
def test_a_narrow_terminal_leaves_whole_columns_out_and_says_so(width):
    many = {FLATNESS: 1234.5, "flatness/worst/test": 4321.5}
    runs = [run("at", 0.5 + 0.1 * s, s) for s in range(3)]
    runs = [
        replace(r, final={**r.final, **{n: x * (r.seed + 1) for n, x in many.items()}})
        for r in runs
    ]
    text = printed(of(*runs), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "60.0±10.0" in text
    words = " ".join(text.split())
    assert re.search(r"No room for .*early-stopped RErr: see table1\.md\.", words)
    assert "early-stopped" not in printed(of(run("at", 0.5)), 80)
    assert "2469.00±1234.50" in text


def test_letters_of_labels_are_explained(tmp_path):
    options = [{f"a_long_name_{index}": value for index in range(5)} for value in (1, 2)]
    table = of(*(run("at", 0.5, settings={"model": given}) for given in options))
    assert "AT (b): a_long_name_0=2, a_long_name_1=2" in written(table, tmp_path)[".md"].replace(
        "\\_", "_"
    )


def test_terminal_table_leaves_brackets_alone():
    assert "m[red]x" in printed(of(run("m[red]x", 0.5)))


def test_models_must_be_some_and_of_one_data_set():
    with pytest.raises(ValueError, match="no model"):
        table1(make_models())
    models = make_models(run("at", 0.5), run("at", 0.5, data="CIFAR10"))
    with pytest.raises(ValueError, match="one data set but got .*CIFAR10.*Digits"):
        table1(models)
