"""Studies that are killed, fail and go on, with a stand-in for training."""

import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from robust_flatness.study import State, launch, make_plan, state_of
from robust_flatness.study.estimate import estimate, plan_table
from robust_flatness.study.pool import Pool
from robust_flatness.study.state import book_of, check_same_study, epochs_done

STAND_IN = str(Path(__file__).with_name("stand_in.py"))


@pytest.fixture(autouse=True)
def _trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, STAND_IN))
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


def test_no_more_than_the_given_jobs_are_at_work(plan, monkeypatch):
    peak = 0
    show = Pool._show

    def watch(self, progress, bars, all_runs, active):
        nonlocal peak
        peak = max(peak, len(active))
        show(self, progress, bars, all_runs, active)

    monkeypatch.setattr(Pool, "_show", watch)
    quiet_pool(jobs=2).run(plan)
    assert peak == 2


STUDY = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from robust_flatness.study import launch, make_plan
from robust_flatness.study.pool import Pool
launch.PROGRAM = (sys.executable, {stand_in!r})
plan = make_plan(rows=["at", "trades"], seeds=[0, 1], root=Path({root!r}), options={options!r})
Pool(2).run(plan)
"""


def study_process(root: Path) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    script = STUDY.format(here=here, stand_in=STAND_IN, root=str(root), options=FOUR)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)


def test_killed_with_its_runs_it_goes_on_where_they_were(plan, tmp_path):
    process = study_process(tmp_path)
    wait_for(lambda: epochs_done(plan[0]) >= 1 and epochs_done(plan[1]) >= 2)
    process.kill()
    process.wait()
    # A power cut ends the runs as well; they are sessions of their own.
    for path in tmp_path.glob("*/pid"):
        os.kill(int(path.read_text()), signal.SIGKILL)
    time.sleep(0.2)
    assert state_of(plan[1]) is State.CUT_OFF
    quiet_pool().run(plan)
    assert all(rows(run) == ["epoch", "0", "1", "2", "3"] for run in plan)
    starts = journal(tmp_path)
    assert starts[f"{plan[1].name} goes on"] == 1
    assert all(starts[f"{run.name} starts"] == 1 for run in plan)


def test_killed_alone_its_runs_end_and_are_not_run_twice(plan, tmp_path):
    process = study_process(tmp_path)
    wait_for(lambda: epochs_done(plan[0]) >= 1 and epochs_done(plan[1]) >= 1)
    process.kill()
    process.wait()
    # Its two runs are still at work while a second study begins.
    quiet_pool().run(plan)
    assert all(rows(run) == ["epoch", "0", "1", "2", "3"] for run in plan)
    assert journal(tmp_path) == {f"{run.name} starts": 1 for run in plan}


def test_ending_the_study_ends_its_runs(plan, tmp_path):
    process = study_process(tmp_path)
    wait_for(lambda: epochs_done(plan[0]) >= 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    before = rows(plan[0])
    time.sleep(0.5)
    assert rows(plan[0]) == before
    assert state_of(plan[0]) is State.CUT_OFF


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
    assert [failure.run.name for failure in pool.failures] == ["mart-Digits-s0"]
    assert pool.failures[0].reason == "RuntimeError: It broke."
    assert "Traceback" in book_of(broken[0], "log").read_text()


def test_arguments_that_are_refused_twice_stop_the_study(tmp_path):
    plan = make_plan(rows=["all"], root=tmp_path, options=[*FOUR, "--refuse"])
    pool = quiet_pool(jobs=1)
    pool.run(plan)
    assert len(pool.failures) == 2
    assert "Expected `--refuse` to be unknown." in pool.failures[0].reason


def test_runs_of_other_arguments_are_not_taken_for_these(plan, tmp_path):
    quiet_pool().run(plan[:1])
    check_same_study(plan[0])
    (other,) = make_plan(rows=["at"], root=tmp_path, options=["--trainer.max_epochs=5"])
    with pytest.raises(ValueError, match="max_epochs=4.* but got .*max_epochs=5.*: choose another"):
        check_same_study(other)
    book_of(plan[0], "json").unlink()
    with pytest.raises(ValueError, match="is a run of its own: choose another root"):
        check_same_study(plan[0])


def test_each_run_gets_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert quiet_pool(jobs=2)._environment(1) == {"OMP_NUM_THREADS": "4"}
    gpus = quiet_pool(jobs=4, devices=[5, 6])
    assert [gpus._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == list("5656")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert quiet_pool()._environment(0) == {}


def test_how_long_it_takes_is_read_from_finished_runs(plan, tmp_path):
    assert estimate(tmp_path, "Digits").by_method == {}
    quiet_pool().run(plan[:1])
    measured = estimate(tmp_path, "Digits")
    assert measured.by_method == {"at": 2.0}  # 8 s for 4 epochs
    assert measured.seconds(plan) == pytest.approx(3 * 4 * 2.0)
    console = Console(file=io.StringIO(), width=100)
    console.print(plan_table(plan, jobs=2))
    assert "About 12 s for what is left, 2 at once" in console.file.getvalue()
