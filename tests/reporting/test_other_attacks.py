"""Errors by other attacks of AutoAttack than `standard` in tables and on the page."""

from run_factory import EARLY_STOPPED, FINAL, make_run, read_models, write_run

from robust_flatness.reporting.figures import Figures
from robust_flatness.reporting.page import write_page
from robust_flatness.reporting.table1 import table1, write_table
from robust_flatness.run_folder.runs import load_run

CHOSEN = {"autoattack": {"version": "custom", "attacks": ["apgd-t", "apgd-ce"]}}
NAME = "test/apgd-ce+apgd-t_error"


def write(root, name, seed, settings=None, error=0.55):
    final = FINAL | {"test/autoattack_error": error}
    run = make_run(seed=seed, settings=settings or {}, final=final, early_stopped=EARLY_STOPPED)
    return write_run(root / name, run)


def test_errors_by_other_attacks_have_a_name_of_their_own(tmp_path):
    run = load_run(write(tmp_path, "a", 0, CHOSEN))
    assert run.final[NAME] == 0.55
    assert run.early_stopped[NAME] == 0.5
    assert run.num_examples[NAME] == 200
    assert not [name for name in run.final if "autoattack" in name]
    standard = load_run(write(tmp_path, "b", 0))
    assert standard.final["test/autoattack_error"] == 0.55
    assert NAME not in standard.final


def test_errors_by_different_attacks_are_not_pooled(tmp_path):
    write(tmp_path, "a", 0, CHOSEN, error=0.25)
    write(tmp_path, "b", 1, error=0.75)
    models = read_models(tmp_path)
    assert len(models) == 2
    table = table1(models)
    errors = dict(zip(table.frame["test_robust_error_attack"], table.frame["test_robust_error_n"]))
    assert errors == {"APGD-CE + APGD-T": 1, "AutoAttack": 1}
    assert all("test_robust_error" not in table.means(rows) for rows in table.groups.values())
    text = write_table(table, tmp_path)[0].read_text()
    assert "test RErr (AA or ‡APGD-CE + APGD-T, %)" in text
    assert "25.0 ‡" in text
    assert "75.0 |" in text
    assert "‡ By these attacks alone" in text
    page = write_page(tmp_path / "index.html", Figures(models)).read_text()
    assert "RErr (APGD-CE + APGD-T), test, in %" in page
    assert "200 ((APGD-CE + APGD-T))" not in page
    assert "200 (APGD-CE + APGD-T)" in page


def test_other_attacks_alone_are_named_without_marks(tmp_path):
    write(tmp_path, "a", 0, CHOSEN)
    text = write_table(table1(read_models(tmp_path)), tmp_path)[0].read_text()
    assert "test RErr (APGD-CE + APGD-T, %)" in text
    assert "‡" not in text
