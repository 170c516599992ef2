"""A whole report: what it writes, what it leaves out, and what the command says."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.text import Text
from rich.console import Console
from run_factory import EARLY_STOPPED, FINAL, make_models, make_run, write_metrics, write_run

from robust_flatness.cli import main
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.figures import Figures
from robust_flatness.reporting.matplotlib_figures import correlations_figure, relation_figure
from robust_flatness.reporting.plotly_figures import page_figures
from robust_flatness.reporting.report import write_report
from robust_flatness.reporting.table1 import table1, terminal_table
from robust_flatness.run_folder.files import Landscape
from robust_flatness.run_folder.runs import load_run
from robust_flatness.run_folder.summary import summary_table

METHODS = ("at", "at_awp", "trades", "mart")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Four methods with two seeds, and one folder of each kind that cannot be used."""
    root = tmp_path_factory.mktemp("study")
    steps = np.linspace(-1, 1, 5)
    bowl = Landscape(steps, 1 + np.ones((3, 1, 2)) * 4 * steps[None, :, None] ** 2)
    for number, method in enumerate(METHODS):
        for seed in (0, 1):
            final = FINAL | {"test/robust_loss": 1.9 - 0.2 * number + 0.01 * seed}
            final |= {"flatness/average/test": 4.1 - 0.7 * number - 0.02 * seed}
            folder = root / f"{method}-Digits-s{seed}"
            run = make_run(method, seed, final=final, early_stopped=EARLY_STOPPED, folder=folder)
            write_run(folder, run, landscapes={"final/random": bowl})
    broken = write_run(root / "broken", make_run("gelu", 3))
    (broken / "results.json").write_text('{"method": "gelu", ')
    old = write_run(root / "old", make_run("silu", 3))
    content = json.loads((old / "results.json").read_text())
    (old / "results.json").write_text(json.dumps(content | {"trajectory": None}))
    torn = write_run(root / "torn", make_run("mish", 3))
    (torn / "landscapes.npz").write_bytes(b"PK half of a file")
    unfinished = root / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").touch()
    write_metrics(unfinished, [{"epoch": 0}, {"epoch": 1}])
    for name, wrong in (("x", {"seed": "x"}), ("inf", {"epochs": 1e999}), ("5", {"data": 5})):
        path = write_run(root / "wrong" / name, make_run("gelu", 3)) / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    red = root / "[" / "red]"
    red.mkdir(parents=True)
    (red / "config.yaml").touch()
    (red / "metrics.csv").write_bytes(b"\xff\x00\n")
    other = root / "other"
    write_run(other, make_run("at", 0, data="CIFAR10", folder=other))
    again = root / "copied"
    write_run(again, make_run("at", 0, folder=again))
    return root


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    return write_report(study, tmp_path_factory.mktemp("report"))


def test_everything_is_written(report):
    assert {path.name for path in report.folder.iterdir()} == {
        "index.html",
        "table1.md",
        "table1.csv",
        "table1.tex",
        "correlations.csv",
        "figures",
    }
    written = {path.name for path in (report.folder / "figures").iterdir()}
    assert written == {f"{name}.{kind}" for name in report.figures for kind in ("png", "pdf")}
    # No method has two models, so there is nothing to draw a trend through.
    assert {"flatness", "curves", "landscapes", "schematic", "loss-and-error"} <= set(
        report.figures
    )
    assert "hyperparameters" not in report.figures


def test_models_are_those_of_the_finished_runs(report):
    assert report.models.methods == sorted(METHODS)
    assert [len(runs) for runs in report.models.runs.values()] == [2] * 4
    assert report.data == "Digits"


def test_what_is_left_out_is_told_with_its_reason(report):
    reasons = {folder.name: reason for folder, reason in report.left_out}
    assert set(reasons) == {
        *("broken", "torn", "old", "unfinished", "other", "copied"),
        *("x", "inf", "5", "red]"),
    }
    assert reasons["x"].endswith("format (`seed` is 'x', not an integer >= 0)")
    assert reasons["inf"].endswith("format (`epochs` is inf, not an integer >= 0)")
    assert reasons["5"].endswith("format (`data` is 5, not a name in one line)")
    assert reasons["red]"] == "not finished: no epoch was recorded"
    assert "results.json is broken" in reasons["broken"]
    assert "landscapes.npz is broken or not of landscapes" in reasons["torn"]
    assert "older format, without trajectory" in reasons["old"]
    assert reasons["unfinished"] == "not finished: 2 epochs were recorded"
    assert reasons["other"] == "is on CIFAR10; `--data=CIFAR10` reports it"
    # It has no landscapes.
    assert reasons["copied"].endswith("/at-Digits-s0, which was measured better")
    page = (report.folder / "index.html").read_text()
    assert all(escape(reason) in page for reason in reasons.values())


def test_correlations_of_runs_and_paper_stand_beside_each_other(report):
    with (report.folder / "correlations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = ("flatness/average/test", "test/robust_loss", "final", "")
    pair = [r for r in rows if (r["x"], r["y"], r["weights"], r["given"]) == wanted]
    own, paper = pair
    assert (own["of"], own["models"], paper["models"]) == ("runs", "4", "74")
    assert float(own["pearson"]) == pytest.approx(report.correlation.pearson)
    assert float(own["pearson"]) == pytest.approx(1.0, abs=0.01)
    assert (round(float(paper["pearson"]), 2), round(float(paper["spearman"]), 2)) == (0.85, 0.86)


def test_another_data_set_is_reported_when_asked(study, tmp_path):
    made = write_report(study, tmp_path, data="CIFAR10", published=False)
    assert made.models.labels == ["AT"]
    assert made.correlation is None
    assert "paper" not in (tmp_path / "table1.md").read_text()


def test_checks_and_error_curves_are_tables_and_on_the_page(tmp_path):
    run = write_run(tmp_path / "runs" / "at", make_run())
    path = run / "results.json"
    failed = {"name": "AutoAttack − PGD", "passed": False, "text": "4 points <more>"}
    passed = {"name": "RErr at ε → 1", "passed": True, "text": "100 %"}
    details = {
        "checks": {"final": [passed, failed]},
        "error_curve": {"final": {"eps": [0.0, 0.5], "robust_error": [0.1, 1.0]}},
        # JSON has no NaN: no image is of class 2.
        "class_errors": {"final": {"test": [0.25, 0.75, None]}},
    }
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | details))
    folder = tmp_path / "report"
    made = write_report(tmp_path / "runs", folder, published=False)
    read = {name: (folder / f"{name}.csv").read_text().splitlines() for name in details}
    assert read["checks"][2] == "AT,at,final,AutoAttack − PGD,False,4 points <more>"
    assert read["error_curve"][1:] == ["AT,at,final,0.0,0.1", "AT,at,final,0.5,1.0"]
    assert read["class_errors"][2:] == ["AT,at,final,test,1,0.75", "AT,at,final,test,2,"]
    page = (folder / "index.html").read_text()
    assert "1 of 2 checks passed" in page
    assert "✗ AutoAttack − PGD</b>, at, last weights: 4 points &lt;more&gt;" in page
    assert "<option>RErr against ε</option>" in page
    assert "<option>RErr of each class</option>" in page
    by_class = page_figures(Figures(made.models))["views"]["RErr of each class"]
    assert "largest, of class 1: 75.0 %" in by_class.data[0].hovertemplate
    path.write_text(json.dumps(content))
    write_report(tmp_path / "runs", folder, published=False)
    assert not (folder / "checks.csv").exists()
    assert 'id="checks"' not in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"checks": {"final": [{"name": "x"}]}},
        {"checks": {"final": 3}},
        {"error_curve": {"final": {"eps": [0.1], "robust_error": []}}},
        {"class_errors": {"final": {"test": ["x"]}}},
    ],
)
def test_checks_and_curves_of_another_format_are_left_out_with_a_reason(tmp_path, wrong):
    path = write_run(tmp_path / "at", make_run()) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=f"another format \\(`{next(iter(wrong))}` is "):
        load_run(tmp_path / "at")


def test_the_map_of_correlations_has_a_row_for_each_measure(report):
    assert {"correlations", "correlations-early-stopped"} & set(report.figures)
    figure = correlations_figure(Figures(report.models))
    # Train RErr is the same for all, so that no coefficient is given it.
    assert [axes.get_title() for axes in figure.axes[:-1]] == ["runs\nraw"]
    raw = figure.axes[0]
    names = [text.get_text() for text in raw.get_yticklabels()]
    assert "average-case flatness" in names
    cells = np.asarray(raw.images[0].get_array())
    x = names.index("average-case flatness")
    expected = correlate(report.models, "flatness/average/test", "test/robust_loss").kendall
    assert cells[x, 0] == pytest.approx(expected)


def test_a_figure_that_is_no_longer_drawn_goes(study, tmp_path):
    stale = tmp_path / "figures" / "hyperparameters.png"
    stale.parent.mkdir()
    stale.touch()
    write_report(study, tmp_path, published=False)
    assert not stale.exists()


def test_the_command_says_what_it_found_and_left_out(study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["report", str(study), "--published=false"])
    text = " ".join(capsys.readouterr().out.split())
    assert "RLoss and flatness: Pearson 1.00, Spearman 1.00; 4 models: too few for an" in text
    assert "unfinished not finished: 2 epochs were recorded" in text
    assert "wrong/x results.json is of another format (`seed` is 'x', not an integer >= 0)" in text
    assert "study0/[/red] not finished: no epoch was recorded" in text
    assert "8 runs, 4 models" in text
    assert "report/index.html" in text
    assert Path("report/index.html").is_file()


def test_names_are_shown_as_they_are(capsys):
    names = (r"$\foo$", "[/red]", "a$b$ <b>")
    models = make_models(*(make_run(name, data=r"$\bar$", final=FINAL) for name in names))
    relation = Figures(models).relation("flatness/average/test", "test/robust_loss")
    figure = relation_figure(relation, title=r"on $\bar$ [/red]")
    figure.savefig(io.BytesIO(), dpi=30)
    shown = {text.get_text() for text in figure.findobj(Text)}
    assert {*names, r"on $\bar$ [/red]"} <= shown
    table = table1(models)
    for drawn in (
        terminal_table(table),
        summary_table({"method": "[/red]", "data": "[/b]"}, folder="[/i]"),
    ):
        Console(width=100).print(drawn)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, r"$\bar$", "[/red] on [/b]", "[/i]"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "Expected `runs` to be a folder with run folders but got nowhere."),
        ([], "runs"),
        (
            ["{study}", "--data=MNIST"],
            "Expected `--data` to be one of Digits, CIFAR10 but got MNIST",
        ),
        (["{study}/unfinished"], "Expected `runs` to hold a finished run but got"),
    ],
)
def test_bad_input_is_one_sentence(study, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *(argument.format(study=study) for argument in arguments)])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("module", ["reporting.report", "command_line.reports"])
def test_a_report_loads_neither_torch_nor_lightning(study, tmp_path, module):
    code = f"import sys, robust_flatness.{module}\n"
    if module == "command_line.reports":
        call = f"robust_flatness.{module}.report({str(study / 'other')!r}, {str(tmp_path)!r})"
        code += f"{call}\n"
    code += "print(*sorted({'torch', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
