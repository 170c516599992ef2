"""The command, its errors, and the same runs on other machines."""

import json
import os
import pickle
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from run_factory import make_run, write_run

from robust_flatness.cli import main, study_functions
from robust_flatness.study import state
from robust_flatness.study.elsewhere import TrainRun
from robust_flatness.study.plan import make_plan as make_plan_with

make_plan = partial(make_plan_with, study_functions())
STAND_IN = str(Path(__file__).with_name("stand_in.py"))
# A real run in seconds.
TINY = [
    *(f"--{name}.num_examples=8" for name in ("evaluation", "flatness", "early_stopping")),
    "--trainer.max_epochs=2",
    "--data.num_train=64",
    "--model.network.width=4",
    "--model.steps=2",
    "--final.num_examples=8",
    "--final.steps=2",
    "--final.restarts=2",
    "--final.num_perturbations=2",
    "--landscape.num_steps=3",
    "--landscape.num_examples=8",
    "--without=[wandb,autoattack,train_evaluation,train_flatness]",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trains_nothing(monkeypatch):
    """A stand-in for `fit`."""
    monkeypatch.setattr(state, "PROGRAM", (sys.executable, STAND_IN))


@pytest.fixture
def unchecked(monkeypatch):
    """Lets options through that only the stand-in, or nothing, knows."""
    place = "robust_flatness.command_line.lightning_cli.check_arguments"
    monkeypatch.setattr(place, lambda arguments: None)


def said(*arguments: str, capsys) -> str:
    main(["study", *arguments])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("trains_nothing")
def test_rows_and_seeds_are_trained_and_counted(capsys):
    text = said("--rows=at,trades", "--seeds=[3,4]", "--", "--trainer.max_epochs=4", capsys=capsys)
    assert "4 runs on Digits" in text
    assert "4 of 4 runs finished." in text
    assert Path("runs/trades-Digits-s4/results.json").is_file()


@pytest.mark.usefixtures("trains_nothing")
def test_a_dry_run_trains_nothing(capsys):
    text = said("--rows=at", "--dry_run", "true", capsys=capsys)
    assert "1 run on Digits" in text
    assert "0 of 1 run" not in text
    text = said("--rows", "all", "--seeds", "3", "--dry_run", capsys=capsys)
    assert "57 runs on Digits" in text
    assert "The time left is known once a run has finished." in text
    assert not list(Path("runs").glob("*-Digits-*"))


@pytest.mark.usefixtures("trains_nothing", "unchecked")
def test_failures_are_told_at_the_end_and_are_the_exit_status(capsys):
    with pytest.raises(SystemExit, match="1 failed; the same command tries them again."):
        main(["study", "--rows=at", "--", "--trainer.max_epochs=4", "--fail"])
    text = " ".join(capsys.readouterr().out.split())
    assert "0 of 1 run finished." in text
    assert "at-Digits-s0: RuntimeError: It broke." in text
    assert "study/at-Digits-s0.log" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows=att"], "Expected `--rows` to be all, or some of at"),
        (["--rows=at", "--only=b"], "to name runs of the plan, such as at-Digits-s0, but got b."),
        (["--rows=at", "--jobs=0"], "Expected `--jobs` to be >= 1 but got 0."),
        (["--rows=at", "--seed=3"], "--seed"),
        (["--rows=at", "--devices=[99]"], "Expected `--devices` to number some of this machine's"),
        (["--rows=at", "--slurm={no_such: 1, cluster: local}"], "Expected `--slurm` to contain"),
        (["--rows=at", "--slurm={timeout_min: 5}"], 'Could not detect "srun"'),
        (["--rows=at", "--slurm={tasks_per_node: 2}"], "to give a run one task but got tasks_per_"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert sentence in " ".join(text.split())
    assert "Traceback" not in text
    assert not list(Path("runs").glob("*-Digits-*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows=at", "--root=file/deeper"], "Expected `--root` to be a folder but "),
        (["--rows=at", "--sweep_file=."], "to be a file to write but . is a folder."),
        (
            ["--rows=at", "--", "foo"],
            "at-Digits-s0: Expected options such as `--name=value` but got foo without an option.",
        ),
        (["--rows=at", "--", "--model.epss=1"], "epss"),
        (
            ["--rows=at", "--", "--model.eps=-1"],
            "at-Digits-s0: Expected `--model.eps` to be >= 0 but got",
        ),
        (
            ["--rows=all", "--sweep=mine.yaml"],
            "mine-num_workers-1-Digits-s0: Expected `--data.num_workers` to be >= 0 but got -1.",
        ),
    ],
)
def test_what_runs_would_refuse_is_refused_before_there_is_a_plan(
    arguments, sentence, capsys, monkeypatch
):
    # Other tests of the process may have left theirs.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    Path("file").touch()
    content = {"method": "grid", "command": ["fit", "--name=mine", "${args}"]}
    content |= {"parameters": {"data.num_workers": {"values": [-1, 0]}}}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stopped:
        main(["study", "--dry_run", *arguments])
    assert stopped.value.code == 2
    printed, text = capsys.readouterr()
    assert not printed
    assert sentence in " ".join(text.split())
    assert not Path("runs").exists()
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.usefixtures("trains_nothing")
def test_a_wandb_sweep_is_the_same_list_and_each_agent_trains_one(capsys):
    typed = ["--rows=at", "--sweep=trades", "--seeds=2", "--root=many"]
    text = said(*typed, "--sweep_file=all.yaml", "--", "--trainer.max_epochs=4", capsys=capsys)
    assert "Wrote 10 runs to all.yaml. Start it with: wandb sweep all.yaml" in text
    assert "run the same command without --sweep_file." in text
    content = yaml.safe_load(Path("all.yaml").read_text())
    names = content["parameters"]["only"]["values"]
    plan = make_plan(rows=["at"], sweep=["trades"], seeds=[0, 1], root=Path("many"))
    assert names == [run.name for run in plan]
    # As the agent does it.
    command = content["command"]
    place = command.index("${args}")
    agent = [*command[3:place], f"--only={names[3]}", *command[place + 1 :]]
    main(agent)
    assert [path.parent.name for path in Path("many").glob("*/results.json")] == [names[3]]
    assert json.loads(Path(f"many/study/{names[3]}.json").read_text())["arguments"][-2:] == [
        "--trainer.max_epochs=4",
        "--seed_everything=1",
    ]


def test_at_the_time_limit_a_run_is_ended_and_submitted_again(tmp_path, monkeypatch):
    helpers = pytest.importorskip("submitit.helpers")
    monkeypatch.setattr(state, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    (run,) = make_plan(rows=["at"], root=tmp_path)
    work = TrainRun()
    work._process = state.start(run)
    again = work.checkpoint(run)
    assert isinstance(again, helpers.DelayedSubmission)
    assert work._process.returncode == -signal.SIGTERM
    assert pickle.loads(pickle.dumps(work))._process is None


@pytest.mark.usefixtures("trains_nothing")
def test_a_node_trains_one_run_and_its_failure_is_the_jobs(tmp_path):
    run, broken = (
        make_plan(rows=[row], root=tmp_path, options=options)[0]
        for row, options in (("at", []), ("mart", ["--fail"]))
    )
    TrainRun()(run)
    assert (run.folder / "results.json").is_file()
    TrainRun()(run)
    with pytest.raises(RuntimeError, match="mart-Digits-s0 ended with code 1."):
        TrainRun()(broken)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_an_array_of_submitit_trains_the_runs(capsys, monkeypatch):
    submitit = pytest.importorskip("submitit")
    made = []
    map_array = submitit.AutoExecutor.map_array
    monkeypatch.setattr(
        submitit.AutoExecutor,
        "map_array",
        lambda self, *given: made.extend(map_array(self, *given)) or made,
    )
    # The nodes know nothing of a stand-in: the runs are refused, by the real command line.
    text = said(
        "--rows=at",
        "--slurm={cluster: local, timeout_min: 5}",
        "--",
        "--no_such=1",
        capsys=capsys,
    )
    assert "Submitted 1 run as" in text
    (job,) = made
    with pytest.raises(Exception, match="at-Digits-s0 ended with code 2."):
        job.result()
    assert "no_such" in Path("runs/study/at-Digits-s0.log").read_text()


@pytest.mark.parametrize(
    ("kind", "before", "now", "is_used"),
    [
        ("ImageFolder", "/data/cifar10", "/data/svhn", False),
        ("ImageFolder", "/data/cifar10", "~/cifar10", True),
        ("CIFAR10", "data", "/scratch/torchvision", True),
    ],
)
def test_a_kept_run_is_of_the_same_images(kind, before, now, is_used, tmp_path):
    def settings(root):
        return {"data": {"class_path": f"package.{kind}", "init_args": {"root": root}}}

    (run,) = make_plan(rows=["at"], root=tmp_path / "new")
    write_run(tmp_path / "old" / run.name, make_run(settings=settings(before)))
    old = [str(tmp_path / "old")]
    now_all = make_run(settings=settings(now)).settings
    (planned,), sentences = state.use_kept_runs([run], old, lambda arguments: now_all)
    assert (planned.folder.parent.name == "old") == is_used
    assert ["data.root=cifar10, now svhn" in sentence for sentence in sentences] == (
        [] if is_used else [True]
    )


@pytest.mark.slow
def test_a_real_run_is_trained_and_goes_on_if_it_was_killed_while_measuring(capsys):
    said("--rows=at", "--", *TINY, capsys=capsys)
    path = Path("runs/at-Digits-s0/results.json")
    first = json.loads(path.read_text())
    assert first["final"]["flatness/worst/test"] == first["final"]["flatness/worst/test"]
    assert (path.parent / "landscapes.npz").is_file()
    # A run that is kept elsewhere counts as finished if its settings are those of the plan.
    kept = Path("kept") / path.parent.name
    kept.mkdir(parents=True)
    for name in ("results.json", "metrics.csv"):
        shutil.copy(path.parent / name, kept)
    elsewhere = ["--rows=at", "--root=new", "--finished=kept", "--dry_run", "--", *TINY]
    text = said(*elsewhere, capsys=capsys)
    assert "is not used" not in text
    assert re.search(r"at │ 1 │ 1 │ 0 │ 0 │ 0 │", text)
    text = said(*elsewhere, "--model.eps_scale=1.125", "--model.steps=3", capsys=capsys)
    sentence = "model.eps_scale=1.0, now 1.125; model.steps=2, now 3."
    assert f"kept/at-Digits-s0 is not used, as it was trained with {sentence}" in text
    assert re.search(r"at │ 1 │ 0 │ 0 │ 1 │ 2 │", text)
    # The last checkpoint stands before the run measures its end.
    path.unlink()
    said("--rows=at", "--", *TINY, capsys=capsys)
    again = json.loads(path.read_text())
    for key in ("final", "early_stopped", "trajectory", "epochs", "early_stopped_epoch"):
        assert again[key] == first[key], key
