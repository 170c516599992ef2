"""Studies that are killed, fail and go on, with a stand-in for training."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import torch
from rich.console import Console

from robust_flatness.cli import study_functions
from robust_flatness.study import state
from robust_flatness.study.command import plan_table, visible_devices
from robust_flatness.study.plan import PlannedRun
from robust_flatness.study.plan import make_plan as make_plan_with
from robust_flatness.study.pool import Pool
from robust_flatness.study.state import State, epochs_done, start, state_of, study_file
from robust_flatness.study.state import check_same_study as check_same_study_with

COMMAND_LINE = study_functions()
make_plan = partial(make_plan_with, COMMAND_LINE)
check_same_study = partial(check_same_study_with, read_options=COMMAND_LINE.read_options)
STAND_IN = str(Path(__file__).with_name("stand_in.py"))


@pytest.fixture(autouse=True)
def _trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PROGRAM", (sys.executable, STAND_IN))
    monkeypatch.setattr("robust_flatness.study.pool._POLL_SECONDS", 0.05)


@pytest.fixture
def plan(tmp_path):
    """Two rows, two seeds."""
    return make_plan(rows=["at", "trades"], seeds=[0, 1], root=tmp_path, options=FOUR)


FOUR = ["--trainer.max_epochs=4"]


def quiet_pool(jobs: int = 2, **settings) -> Pool:
    return Pool(jobs, console=Console(file=io.StringIO(), width=100), **settings)


def journal(root: Path) -> Counter[str]:
    return Counter((root / "journal").read_text().splitlines())


def rows(run) -> list[str]:
    return (run.folder / "metrics.csv").read_text().splitlines()


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_study_finishes_and_then_has_nothing_to_do(plan, tmp_path):
    quiet_pool().run(plan)
    assert all(state_of(run) is State.FINISHED for run in plan)
    quiet_pool().run(plan)
    assert journal(tmp_path) == {f"{run.name} starts": 1 for run in plan}


def test_no_more_jobs_than_asked_for_run_at_a_time(plan, tmp_path):
    quiet_pool(jobs=2).run(plan)
    assert peak(tmp_path) == 2
    quiet_pool(jobs=1).run(
        make_plan(rows=["mart"], seeds=[0, 1], root=tmp_path / "b", options=FOUR)
    )
    assert peak(tmp_path / "b") == 1


def peak(root: Path) -> int:
    """The largest number of runs that overlap."""
    spans = [tuple(map(float, path.read_text().split())) for path in root.glob("*/span")]
    return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)


STUDY = """
import pickle, sys
from pathlib import Path
from robust_flatness.study import state
from robust_flatness.study.pool import Pool
state.PROGRAM = (sys.executable, {stand_in!r})
{before}
Pool({jobs}).run(pickle.loads(Path({plan!r}).read_bytes()))
"""


# Threads that have ended a run take the next one before it is cancelled.
LATE = """
from concurrent.futures import ThreadPoolExecutor
from time import sleep
shutdown = ThreadPoolExecutor.shutdown
ThreadPoolExecutor.shutdown = lambda *args, **kwargs: (sleep(1), shutdown(*args, **kwargs))
"""


def study_process(
    plan: list[PlannedRun], folder: Path, jobs: int = 2, before: str = ""
) -> subprocess.Popen[bytes]:
    # To make the plan again would import torch and Lightning.
    (folder / "plan").write_bytes(pickle.dumps(plan))
    paths = {"stand_in": STAND_IN, "plan": str(folder / "plan")}
    script = STUDY.format(**paths, jobs=jobs, before=before)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)


@pytest.fixture
def half_way(plan, tmp_path):
    """A study in a process of its own, whose first two runs are held after two epochs."""
    (tmp_path / "hold").touch()
    process = study_process(plan, tmp_path)
    wait_for(lambda: epochs_done(plan[0]) == epochs_done(plan[1]) == 2)
    yield process
    process.kill()


def test_killed_with_its_runs_it_goes_on_where_they_were(plan, tmp_path, half_way):
    half_way.kill()
    half_way.wait()
    # A power cut ends the runs as well; they are sessions of their own.
    for path in tmp_path.glob("*/pid"):
        os.kill(int(path.read_text()), signal.SIGKILL)
    (tmp_path / "hold").unlink()
    assert state_of(plan[1]) is State.CUT_OFF
    quiet_pool().run(plan)
    assert all(rows(run) == ["epoch", "0", "1", "2", "3"] for run in plan)
    starts = journal(tmp_path)
    assert starts[f"{plan[1].name} goes on"] == 1
    assert all(starts[f"{run.name} starts"] == 1 for run in plan)


def test_killed_alone_its_runs_end_and_are_not_run_twice(plan, tmp_path, half_way):
    half_way.kill()
    half_way.wait()
    # Its two runs are still at work while a second study begins, and take its slots.
    Timer(1.0, (tmp_path / "hold").unlink).start()
    pool = quiet_pool()
    pool.run(plan)
    said = pool.console.file.getvalue()
    assert f"waiting for {plan[0].name}, which another process trains" in said
    assert all(rows(run) == ["epoch", "0", "1", "2", "3"] for run in plan)
    assert journal(tmp_path) == {f"{run.name} starts": 1 for run in plan}


def test_ending_the_study_ends_its_runs(plan, tmp_path, half_way):
    half_way.send_signal(signal.SIGTERM)
    assert half_way.wait(timeout=60) != 0
    (tmp_path / "hold").unlink()
    time.sleep(0.5)
    assert rows(plan[0]) == ["epoch", "0", "1"]
    assert state_of(plan[0]) is State.CUT_OFF


def test_a_study_ends_although_several_runs_wait(plan, tmp_path):
    (tmp_path / "hold").touch()
    process = study_process(plan, tmp_path, jobs=1, before=LATE)
    wait_for(lambda: epochs_done(plan[0]) == 2)
    process.terminate()
    try:
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert journal(tmp_path) == {f"{plan[0].name} starts": 1}


def test_what_was_left_before_the_first_checkpoint_starts_anew(plan, tmp_path):
    folder = plan[0].folder
    folder.mkdir()
    (folder / "config.yaml").touch()
    quiet_pool().run(plan[:1])
    assert rows(plan[0]) == ["epoch", "0", "1", "2", "3"]


def test_a_failing_run_does_not_stop_the_others(plan, tmp_path):
    broken = make_plan(rows=["mart"], root=tmp_path, options=[*FOUR, "--fail"])
    pool = quiet_pool()
    pool.run([*broken, *plan])
    assert all(state_of(run) is State.FINISHED for run in plan)
    assert pool.failures == {broken[0]: "RuntimeError: It broke."}
    assert "Traceback" in study_file(broken[0], "log").read_text()


def test_a_run_that_somebody_terminates_is_interrupted_and_can_go_on(tmp_path):
    ended = make_plan(rows=["mart"], root=tmp_path, options=[*FOUR, "--terminated"])
    pool = quiet_pool(jobs=1)
    pool.run(ended)
    assert pool.failures == {ended[0]: "ended by signal SIGTERM"}
    assert state_of(ended[0]) is State.CUT_OFF


def test_a_file_that_is_refused_does_not_stop_the_others_nor_do_brackets(plan, tmp_path):
    refused = make_plan(rows=["mart"], seeds=[0, 1], root=tmp_path, options=[*FOUR, "--refuse"])
    pool = quiet_pool(jobs=1)
    pool.run([*refused, *plan])
    assert all(state_of(run) is State.FINISHED for run in plan)
    assert pool.failures == dict.fromkeys(refused, "error: Expected `--refuse` to be [/unknown].")
    assert "to be [/unknown]." in pool.console.file.getvalue()
    assert "finished trades-Digits-s1 (4 of 6)" in pool.console.file.getvalue()


def test_runs_of_other_settings_are_not_taken_for_these(plan, tmp_path):
    quiet_pool().run(plan[:1])
    check_same_study(plan[0])
    file = tmp_path / "mine.yaml"
    file.write_text("name: at\nmodel: {class_path: AT, init_args: {steps: 7}}\n")
    (other,) = make_plan(configs=[str(file)], root=tmp_path, options=FOUR)
    with pytest.raises(ValueError, match=r"with model.init_args.steps=\(not set\), now 7: choose"):
        check_same_study(other)
    (longer,) = make_plan(rows=["at"], root=tmp_path, options=["--trainer.max_epochs=5"])
    with pytest.raises(ValueError, match="with --trainer.max_epochs=4, now 5: choose another"):
        check_same_study(longer)
    more = [*FOUR, *(f"--model.{name}=1" for name in ("steps", "tau", "alpha", "momentum"))]
    (other,) = make_plan(rows=["at"], root=tmp_path, options=more)
    with pytest.raises(ValueError, match=r"--model.steps=\(not set\), now 1; .*; and 1 more: cho"):
        check_same_study(other)
    for content in ("", "{}", "[]"):
        study_file(plan[0], "json").write_text(content)
        with pytest.raises(ValueError, match="is a run that it did not start: choose another"):
            check_same_study(plan[0])


def test_a_folder_without_files_is_taken(plan):
    (plan[0].folder / "wandb" / "logs").mkdir(parents=True)
    check_same_study(plan[0])
    quiet_pool().run(plan[:1])
    assert state_of(plan[0]) is State.FINISHED
    (plan[1].folder / "wandb").mkdir(parents=True)
    (plan[1].folder / "wandb" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is a run that it did not start: choose another"):
        check_same_study(plan[1])


def test_damaged_results_and_checkpoints_are_none(plan):
    quiet_pool().run(plan[:1])
    (plan[0].folder / "results.json").write_text("")
    assert state_of(plan[0]) is State.CUT_OFF
    (plan[0].folder / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 half")
    assert state_of(plan[0]) is State.NEW
    quiet_pool().run(plan[:1])
    assert state_of(plan[0]) is State.FINISHED


def write_table(folder, content=b"epoch\n0\n"):
    (folder / "metrics.csv").write_bytes(content)


def write_checkpoint(folder, content=b"PK half", name="checkpoints/last.ckpt"):
    path = folder / name
    path.parent.mkdir()
    path.write_bytes(content)


def tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "leave",
    [
        write_table,
        lambda folder: write_table(folder, b"\xff\x00\xfe"),
        write_checkpoint,
        lambda folder: write_checkpoint(folder, b""),
        lambda folder: write_checkpoint(folder, name="checkpoints/best.ckpt"),
        lambda folder: write_checkpoint(folder, name="mine/epoch=3.ckpt"),
        lambda folder: (folder / "results.json").write_text('{"method": 3}'),
        lambda folder: (folder / "results_test.json").touch(),
    ],
)
def test_a_folder_with_a_finished_epoch_is_never_removed(plan, tmp_path, monkeypatch, leave):
    monkeypatch.setattr(state, "PROGRAM", (sys.executable, "-c", ""))
    run = plan[0]
    for number in (1, 2):
        run.folder.mkdir()
        leave(run.folder)
        left = tree(run.folder)
        assert epochs_done(run) in (0, 1)
        assert state_of(run) is State.NEW
        process = start(run)
        assert process.args[-1] == f"--folder={run.folder}"
        process.wait()
        assert not run.folder.exists()
        aside = tmp_path / "study" / f"{run.name}.left-{number}"
        assert tree(aside) == left
        assert f"moved to {aside}" in study_file(run, "log").read_text()


def test_a_run_without_a_checkpoint_starts_anew_beside_its_old_folder(plan, tmp_path):
    plan[0].folder.mkdir()
    write_table(plan[0].folder)
    quiet_pool().run(plan[:1])
    assert state_of(plan[0]) is State.FINISHED
    assert (tmp_path / "study" / f"{plan[0].name}.left-1" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("jobs", "devices", "typed", "expected"),
    [
        (2, [], None, {"OMP_NUM_THREADS": ["4"], "CUDA_VISIBLE_DEVICES": []}),
        (2, [], "1", {"OMP_NUM_THREADS": ["1"], "CUDA_VISIBLE_DEVICES": []}),
        (4, ["5", "6"], "1", {"OMP_NUM_THREADS": ["1"], "CUDA_VISIBLE_DEVICES": ["5", "6"]}),
    ],
)
def test_each_run_gets_a_gpu_or_its_share_of_the_cores(
    plan, monkeypatch, jobs, devices, typed, expected
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if typed is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", typed)
    quiet_pool(jobs=jobs, devices=devices).run(plan)
    seen = [json.loads((run.folder / "environment.json").read_text()) for run in plan]
    for name, values in expected.items():
        assert sorted({each[name] for each in seen if name in each}) == values
    if devices:
        assert [each["CUDA_VISIBLE_DEVICES"] for each in seen].count("5") == 2


def test_gpus_are_numbered_among_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert visible_devices([1], jobs=1) == ["5"]
    assert visible_devices(None, jobs=2) == ["4", "5"]
    assert visible_devices(None, jobs=1) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices([1, 0], jobs=2) == ["1", "0"]
    with pytest.raises(ValueError, match=r"some of this machine's 2 GPUs, from 0, but got \[2\]"):
        visible_devices([2], jobs=1)


def test_how_long_it_takes_is_read_from_finished_runs(plan):
    assert "time left is known once a run has finished" in printed(plan_table(plan, jobs=2))
    quiet_pool().run(plan[:1])
    # 2 s for each of the 12 epochs that are left.
    text = printed(plan_table(plan, jobs=2))
    assert "About 0:00:12 with 2 at a time" in text
    assert [line.split("│")[1:-1] for line in text.splitlines() if "│ at " in line] == [
        [" at     ", "    2 ", "        1 ", "       0 ", "   1 ", "           4 "]
    ]


def test_a_run_without_its_time_gives_no_estimate(plan):
    quiet_pool().run(plan[:1])
    path = plan[0].folder / "results.json"
    path.write_text(
        path.read_text().replace('"wall_time_seconds": 8.0', '"wall_time_seconds": null')
    )
    assert "time left is known once a run has finished" in printed(plan_table(plan, jobs=2))


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_a_terminal_shows_how_far_the_study_is(plan, tmp_path):
    broken = make_plan(rows=["mart"], root=tmp_path, options=[*FOUR, "--fail"])
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    Pool(1, console=console).run([*broken, *plan[:1]])
    shown = console.file.getvalue()
    assert f"0 of 2 finished, 1 failed, running: {plan[0].name} (2/4)" in shown
    assert "0:00:0" in shown
