"""Studies that are killed, fail and go on, with a stand-in for training."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Timer

import pytest
import torch
from rich.console import Console

from robust_flatness.study import State, launch, make_plan, state_of
from robust_flatness.study.devices import visible_devices
from robust_flatness.study.estimate import plan_table, seconds_left
from robust_flatness.study.pool import Pool
from robust_flatness.study.progress import StudyProgress
from robust_flatness.study.state import arguments_now, book_of, check_same_study, epochs_done

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
LONG = ["--trainer.max_epochs=10"]


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
    show = StudyProgress.show

    def watch(self, active):
        nonlocal peak
        peak = max(peak, len(active))
        show(self, active)

    monkeypatch.setattr(StudyProgress, "show", watch)
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


@pytest.fixture
def half_way(plan, tmp_path):
    """A study in a process of its own, whose first two runs are held after two epochs."""
    (tmp_path / "hold").touch()
    process = study_process(tmp_path)
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


def test_a_run_that_somebody_terminates_is_interrupted_and_can_go_on(tmp_path):
    ended = make_plan(rows=["mart"], root=tmp_path, options=[*FOUR, "--terminated"])
    pool = quiet_pool(jobs=1)
    pool.run(ended)
    assert [failure.reason for failure in pool.failures] == ["ended by signal SIGTERM"]
    assert state_of(ended[0]) is State.CUT_OFF


def test_a_file_that_is_refused_does_not_stop_the_others_nor_do_brackets(plan, tmp_path):
    refused = make_plan(rows=["mart"], seeds=[0, 1], root=tmp_path, options=[*FOUR, "--refuse"])
    pool = quiet_pool(jobs=1)
    pool.run([*refused, *plan])
    assert all(state_of(run) is State.FINISHED for run in plan)
    assert [failure.reason for failure in pool.failures] == [
        "error: Expected `--refuse` to be [/unknown]."
    ] * 2
    assert "to be [/unknown]." in pool.console.file.getvalue()
    assert "finished trades-Digits-s1 (4 of 6)" in pool.console.file.getvalue()


def test_runs_of_other_settings_are_not_taken_for_these(plan, tmp_path):
    quiet_pool().run(plan[:1])
    check_same_study(plan[0])
    file = tmp_path / "mine.yaml"
    file.write_text("name: at\nmodel: {class_path: AT, init_args: {steps: 7}}\n")
    (other,) = make_plan(configs=[str(file)], root=tmp_path, options=FOUR)
    with pytest.raises(ValueError, match="without model.init_args.steps, now 7: choose another"):
        check_same_study(other)
    (longer,) = make_plan(rows=["at"], root=tmp_path, options=["--trainer.max_epochs=5"])
    with pytest.raises(ValueError, match="with --trainer.max_epochs=4, now 5: choose another"):
        check_same_study(longer)
    more = [*FOUR, *(f"--model.{name}=1" for name in ("eps", "steps", "alpha", "momentum"))]
    (other,) = make_plan(rows=["at"], root=tmp_path, options=more)
    with pytest.raises(ValueError, match="trained without --model.eps, now 1; .*; and 1 more: cho"):
        check_same_study(other)
    for content in ("", "{}", "[]"):
        book_of(plan[0], "json").write_text(content)
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
def test_a_folder_with_a_finished_epoch_is_never_removed(plan, tmp_path, leave):
    run = plan[0]
    for number in (1, 2):
        run.folder.mkdir()
        leave(run.folder)
        left = tree(run.folder)
        assert epochs_done(run) in (0, 1)
        assert state_of(run) is State.NEW
        assert arguments_now(run)[-1] == f"--folder={run.folder}"
        assert not run.folder.exists()
        aside = tmp_path / "study" / f"{run.name}.left-{number}"
        assert tree(aside) == left
        assert f"moved to {aside}" in book_of(run, "log").read_text()


def test_a_run_without_a_checkpoint_starts_anew_beside_its_old_folder(plan, tmp_path):
    plan[0].folder.mkdir()
    write_table(plan[0].folder)
    quiet_pool().run(plan[:1])
    assert state_of(plan[0]) is State.FINISHED
    assert (tmp_path / "study" / f"{plan[0].name}.left-1" / "metrics.csv").is_file()


def test_each_run_gets_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert quiet_pool(jobs=2)._environment(1) == {"OMP_NUM_THREADS": "4"}
    gpus = quiet_pool(jobs=4, devices=["5", "6"])
    assert [gpus._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == list("5656")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert quiet_pool()._environment(0) == {}


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


def test_how_long_it_takes_is_read_from_finished_runs(plan, tmp_path):
    assert all(map(math.isnan, seconds_left(plan).values()))
    quiet_pool().run(plan[:1])
    left = seconds_left(plan)
    # 8 s for each of the three that are left; the others' method has not finished.
    assert list(left.values()) == [0.0, 8.0, 8.0, 8.0]
    console = Console(file=io.StringIO(), width=100)
    console.print(plan_table(plan, jobs=2))
    assert "About 16 s with 2 at once" in console.file.getvalue()


def test_what_a_run_measures_at_its_end_counts_apart_from_its_epochs(plan, tmp_path):
    quiet_pool().run(plan[:3])
    # As Lightning writes it: 2 of the 8 s are those of the four epochs.
    content = {"epoch": 3, "callbacks": {"Results": {"wall_time_seconds": 2.0}}}
    for run in plan[:2]:
        torch.save(content, run.folder / "checkpoints" / "last.ckpt")
    (longer,) = make_plan(rows=["at"], seeds=[7], root=tmp_path, options=LONG)
    assert seconds_left([longer]) == {longer: 10 * 0.5 + 6.0}
    # Cut off while it measured its end, and with a checkpoint that is no more.
    for run in plan[1:3]:
        (run.folder / "results.json").unlink()
    (plan[2].folder / "checkpoints" / "last.ckpt").write_bytes(b"PK half")
    assert list(seconds_left(plan).values()) == [0.0, 6.0, 8.0, 8.0]


def test_a_run_that_measures_its_end_is_shown_as_such(plan):
    with StudyProgress(plan, plan, Console(file=io.StringIO())) as progress:
        plan[0].folder.mkdir()
        for recorded, shown in ((3, ""), (4, ", measuring its end")):
            (plan[0].folder / "metrics.csv").write_text("epoch\n" + "0\n" * recorded)
            progress.show(plan[:1])
            task = progress._bars.tasks[-1]
            assert (task.description, task.completed) == (f"  {plan[0].name}{shown}", recorded)
