"""What a study is made of."""

from functools import partial
from pathlib import Path

import pytest

from robust_flatness.cli import study_functions
from robust_flatness.study.plan import CONFIGS, ROWS
from robust_flatness.study.plan import make_plan as make_plan_with

ROOT = Path("runs")
make_plan = partial(make_plan_with, study_functions())


def test_all_rows_times_seeds():
    plan = make_plan(rows=["all"], seeds=[0, 1, 2], root=ROOT)
    assert len(plan) == 57
    assert len({run.folder for run in plan}) == 57
    assert [run.stem for run in plan[::3]] == [f"{row}-Digits" for row in ROWS]
    assert [run.arguments[-1] for run in plan[:3]] == [f"--seed_everything={n}" for n in range(3)]
    assert plan[0].folder == ROOT / "at-Digits-s0"


def test_epochs_are_those_of_the_preset_on_the_data():
    epochs = {run.stem: run.epochs for run in make_plan(rows=["at", "cyclic"], root=ROOT)}
    assert epochs == {"at-Digits": 60, "cyclic-Digits": 24}
    (shorter,) = make_plan(rows=["at"], root=ROOT, options=["--trainer.max_epochs=3"])
    assert shorter.epochs == 3
    (apart,) = make_plan(rows=["at"], root=ROOT, options=["--trainer.max_epochs", "5"])
    assert apart.epochs == 5
    (cifar,) = make_plan(rows=["at"], root=ROOT, data="CIFAR10")
    assert (cifar.epochs, cifar.name) == (150, "at-CIFAR10-s0")


def test_a_set_up_comes_before_the_rows_so_that_they_may_be_shorter():
    options = ["--config", "cifar10.yaml", "--trainer.precision=bf16-mixed"]
    plan = make_plan(rows=["at", "cyclic"], root=ROOT, data="CIFAR10", options=options)
    assert [run.epochs for run in plan] == [150, 60]
    assert "--trainer.precision=bf16-mixed" in plan[0].arguments


def test_a_sweep_is_a_run_a_value_in_a_folder_of_its_own():
    plan = make_plan(sweep=["trades", "configs/sweeps/constant_rate.yaml"], root=ROOT)
    names = [run.name for run in plan]
    assert names[:2] == ["trades-lam1.0-Digits-s0", "trades-lam3.0-Digits-s0"]
    assert len(names) == len(set(names)) == 7
    assert "--model.lam=3.0" in plan[1].arguments


def test_files_of_the_user_are_runs_by_their_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmodel: ATAWP\ntrainer: {max_epochs: 7}\n")
    (run,) = make_plan(configs=[str(file)], seeds=[4], root=ROOT)
    assert (run.name, run.epochs) == ("mine-Digits-s4", 7)
    assert run.arguments[-1] == "--seed_everything=4"


def test_the_study_adds_its_measures_below_everything_else():
    (run,) = make_plan(rows=["at"], root=ROOT, options=["--final.extras=[clean]"])
    files = [argument for argument in run.arguments if argument.startswith("--config=")]
    assert [Path(file).name for file in files] == ["study.yaml", "at.yaml"]
    assert run.settings["files"]["final"]["extras"] == ["worst"]
    assert run.settings["typed"] == ["--final.extras=[clean]"]


def test_a_file_of_the_user_is_not_taken_for_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text("method: grid\n")
    Path("table1").mkdir()
    Path("table1/at.yaml").write_text("name: mine\n")
    (run,) = make_plan(rows=["at"], root=ROOT)
    assert run.stem == "at-Digits"
    assert "landscape" in run.settings["files"]


def test_the_data_is_what_a_file_names_unless_it_is_typed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndata: CIFAR10\n")
    assert make_plan(configs=[str(file)], root=ROOT)[0].name == "mine-CIFAR10-s0"
    assert make_plan(configs=[str(file)], root=ROOT, data="Digits")[0].data == "Digits"


@pytest.mark.parametrize("sweep", sorted(p.stem for p in (CONFIGS / "sweeps").glob("*.yaml")))
def test_every_sweep_of_the_package_is_a_plan(sweep):
    names = [run.name for run in make_plan(sweep=[sweep], root=ROOT)]
    assert len(names) == len(set(names)) >= 2
    assert all(name.startswith(f"{sweep}-") and "yaml" not in name for name in names)


def test_a_config_that_is_swept_is_named_by_its_leaves():
    names = [run.stem for run in make_plan(sweep=["cyclic"], root=ROOT)]
    assert names[0] == "cyclic-epochs_share0.5-cycles1-Digits"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "Expected `--rows`, `--sweep` or `--configs` to say what to train but got none."),
        ({"rows": ["att"]}, "Expected `--rows` to be all, or some of at, .* but got att."),
        ({"sweep": ["nothing"]}, "Expected `--sweep` to be a sweep file or one of .* got nothing"),
        (
            {"rows": ["at"], "seeds": []},
            r"Expected `--seeds` to be different numbers but got \[\].",
        ),
        ({"rows": ["at"], "seeds": [0, 0]}, r"to be different numbers but got \[0, 0\]."),
        ({"rows": ["all", "at"]}, "Expected `--rows` to be all, or some of .* but got all, at."),
        ({"rows": ["at"], "options": ["--name=x"]}, "to be for all runs but got --name, which"),
        ({"rows": ["at"], "options": ["--seed_everything", "1"]}, "but got --seed_everything,"),
        (
            {"rows": ["at"], "options": ["--trainer.max_epochs=a"]},
            "`trainer.max_epochs` to be >= 1",
        ),
        (
            {"configs": ["no.yaml"]},
            "Expected `--configs` to name files but no.yaml does not exist",
        ),
        ({"rows": ["at"], "data": "MNIST"}, "Expected `--data` to be one of .* but got MNIST."),
        ({"rows": ["at", "at"]}, "several called at-Digits-s0: list each once, or set"),
    ],
)
def test_bad_input_is_one_sentence(asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(root=ROOT, **asked)


GRID, FIT = "method: grid\n", "command: [fit, '${args}']\n"
VALUES = "parameters: {a: {values: [1]}}\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"method: random\n{FIT}{VALUES}", "have the method grid but .*mine.yaml has random"),
        (f"{GRID}{FIT}parameters: [a]\n", "the parameters of `--sweep` to have `values`"),
        (f"{GRID}{FIT}parameters: {{a: {{parameters: 1}}}}\n", "the parameters of `--sweep`"),
        (f"{GRID}{VALUES}", "to be a list with fit and .* but .*mine.yaml has None"),
        (f"{GRID}command: ['${{args}}']\n{VALUES}", r"but .*mine.yaml has \['\${args}'\]"),
        (f"{GRID}command: [fit]\n{VALUES}", r"but .*mine.yaml has \['fit'\]"),
        ("grid", "to hold a mapping but got str in .*mine.yaml."),
        (f"{GRID}command: [fit\n", r"to be YAML but got .*mine.yaml: .*expected .* in line 3\."),
    ],
)
def test_what_is_wrong_in_a_sweep_file_is_named(tmp_path, content, sentence):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence) as refused:
        make_plan(sweep=[str(file)], root=ROOT)
    assert "\n" not in str(refused.value)
