"""A start that is refused leaves nothing, a run folder has one owner, and signals have a status."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import Callback
from PIL import Image

from robust_flatness.cli import CLI, main
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT
from robust_flatness.run_folder.claim import RunFolder

TINY = [
    "--trainer.max_epochs=2",
    "--data.num_train=64",
    "--data.batch_size=32",
    "--model.network.width=8",
    "--model.steps=1",
    "--trainer.enable_progress_bar=false",
    "--evaluation.num_examples=8",
    "--early_stopping.num_examples=8",
    "--final={num_examples: 8, steps: 1, restarts: 1, num_perturbations: 1}",
]
LIGHT = "--without=[final,autoattack,flatness,train_flatness,train_evaluation]"
OFFLINE = "--without=[wandb,final,autoattack,flatness,train_flatness,train_evaluation]"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    wandb.finish()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def opened(monkeypatch):
    """How often a W&B run was opened."""
    runs = []
    start = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **kwargs: runs.append(kwargs) or start(**kwargs))
    return runs


def add_callback(monkeypatch, callback: Callback) -> None:
    build = CLI.instantiate_trainer

    def instantiate(self, **kwargs):
        trainer = build(self, **kwargs)
        trainer.callbacks.insert(1, callback)
        return trainer

    monkeypatch.setattr(CLI, "instantiate_trainer", instantiate)


def everything() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *TINY, LIGHT, *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_size=100000"], "batch_size` to be at most"),
        (["--model.lr_scheduler.milestones=[2]"], "milestones` to be in [0, 1] but got 2.0"),
        (
            ["--model.optimizer.lr=-1"],
            "`--model.optimizer.lr` to be valid but got -1: Invalid learning rate: -1.0",
        ),
        (["--data.unlabeled=no", "--data.unlabeled_share=0.5"], "unlabeled` to be"),
        (["--model=ATUnlabeled"], "set `data.unlabeled_share`"),
        (["--trainer.val_check_interval=1000"], "val_check_interval"),
        (
            ["--weight_clipping.w_max=0.1", "--model.network.norm=batch"],
            "`leave_out` to name the scales network.body.1.weight",
        ),
        (["--model=ATEntropySGD", "--model.optimizer=SGD"], "build an EntropySGD"),
    ],
)
def test_a_refused_start_leaves_no_file_and_no_wandb_run(arguments, message, capsys, opened):
    assert message in refusal(arguments, capsys)
    assert everything() == []
    assert opened == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "foo"),
        ("WANDB_RUN_ID", "a/b"),
        ("WANDB_PROJECT", "a#b"),
        ("WANDB_HTTP_TIMEOUT", "soon"),
        ("WANDB_DATA_DIR", "/dev/null/x"),
        ("WANDB_CACHE_DIR", "/proc/x"),
    ],
)
def test_environment_variables_of_wandb_are_refused_by_name(
    name, value, monkeypatch, capsys, opened
):
    monkeypatch.setenv(name, value)
    said = refusal([], capsys)
    assert re.match(f"error: Expected (`|the environment's ){name}", said)
    assert value in said
    assert everything() == []
    assert opened == []


def test_a_broken_test_image_is_found_before_anything_is_left(tmp_path, capsys, opened):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                image = Image.effect_noise((8, 8), 60 + number).convert("RGB")
                image.putpixel((0, 0), (number, 2 * number, 3 * number))
                image.save(folder / f"{number}.png")
    broken = tmp_path / "data" / "test" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    before = everything()
    data = ["--data=ImageFolder", "--data.root=data", "--data.num_train=16", "--data.batch_size=4"]
    data += ["--data.num_val=4", "--data.num_test=8", "--model.network=SmallResNet"]
    for extra in ([], ["--data.in_memory=false"]):
        assert "3.png" in refusal([*data, *extra], capsys)
        assert everything() == before
    assert opened == []


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyboardInterrupt])
def test_what_fails_in_the_first_batch_leaves_nothing(kind, monkeypatch, opened, capsys):
    def fail(self, images, labels):
        raise kind("Expected a better batch.")

    monkeypatch.setattr(AT, "attack", fail)
    with pytest.raises(RuntimeError if kind is RuntimeError else SystemExit) as stopped:
        main(["fit", *TINY, LIGHT])
    if kind is not RuntimeError:
        assert stopped.value.code == {ValueError: 2, KeyboardInterrupt: 130}[kind]
    assert everything() == []
    assert opened == []
    assert "To resume" not in capsys.readouterr().err


def test_no_training_batch_at_all_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(Digits, "train_dataloader", lambda self: [])
    assert "training data of at least one batch" in refusal([], capsys)
    assert everything() == []


def test_wandb_opens_after_the_first_batch_and_misses_nothing(monkeypatch, opened):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            here = Path("runs/AT-Digits-s0")
            seen.append((len(opened), sorted(path.name for path in here.iterdir())))

    add_callback(monkeypatch, Watch())
    monitor = ["--trainer.callbacks+=LearningRateMonitor"]
    main(["fit", *TINY, LIGHT, *monitor])
    wandb.finish()
    assert seen[0] == (0, [])
    assert seen[1][0] == 1
    assert {"config.yaml", "metrics.csv", "wandb"} <= set(seen[1][1])
    from wandb_reader import read_runs

    (run,) = read_runs(Path("runs/AT-Digits-s0"))
    rates = [step["lr-SGD"] for step in run.history if "lr-SGD" in step]
    # One an epoch, the first of which came before the run was open.
    assert rates == [0.1, 0.1]
    assert run.config["num_classes"] == run.config["model"]["init_args"]["num_classes"] == 10


def test_training_is_the_same_with_wandb_and_without(monkeypatch):
    weights = []

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            weights.append([p.detach().clone() for p in pl_module.parameters()])

    add_callback(monkeypatch, Keep())
    for without in (LIGHT, OFFLINE):
        main(["fit", *TINY, without])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_resumed_run_that_is_refused_stays_as_it_was(capsys, monkeypatch):
    main(["fit", *TINY, LIGHT])
    wandb.finish()
    last = "runs/AT-Digits-s0/checkpoints/last.ckpt"

    def contents() -> dict[str, tuple[bytes, int]]:
        # W&B's own process may still be writing its log of the first run.
        files = [Path(name) for name in everything() if "/wandb/" not in name]
        stamps = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
        return {str(path): (path.read_bytes(), stamp) for path, stamp in stamps.items()}

    before = contents()

    def fail(self, images, labels):
        raise ValueError("Expected a better batch.")

    longer = ["--trainer.max_epochs=3", "--trajectory.every_n_epochs=1", f"--ckpt_path={last}"]
    with monkeypatch.context() as patch:
        patch.setattr(AT, "attack", fail)
        for wrong, message in (("32", "a better batch"), ("100", "batch_size` to be at most")):
            assert message in refusal([*longer, f"--data.batch_size={wrong}"], capsys)
            assert contents() == before
    # A finished run has no further batch, and is measured once more.
    main(["fit", *TINY, LIGHT, f"--ckpt_path={last}"])
    results = "runs/AT-Digits-s0/results.json"
    assert contents()[results] != before[results]


def test_a_figure_that_fails_costs_no_results(monkeypatch, recwarn):
    def fail(*args, **kwargs):
        raise ValueError("no ink")

    drawn = ("figures.trajectory_figure", "landscape_figures.landscape_figure")
    logged = ("trajectory.log_figures", "results.log_summary")
    for name in (*(f"plotting.{n}" for n in drawn), *(f"callbacks.{n}" for n in logged)):
        monkeypatch.setattr(f"robust_flatness.{name}", fail)
    monkeypatch.setattr(wandb.Artifact, "add_file", fail)
    landscape = "--landscape={num_examples: 4, num_directions: 1, num_steps: 2, steps: 1}"
    main(["fit", *TINY, "--log_checkpoints", landscape, LIGHT])
    assert Path("runs/AT-Digits-s0/results.json").is_file()
    said = "\n".join(str(warning.message) for warning in recwarn)
    tried = ("draw the trajectory", "log the trajectory", "draw the landscape", "send the check")
    for what in tried:
        assert f"could not {what}" in said
    assert "ValueError: no ink" in said


def test_a_name_is_no_mathematics():
    main(["fit", *TINY, OFFLINE, r"--name=a$\foo$"])
    (folder,) = Path("runs").iterdir()
    assert folder.name == r"a$\foo$-Digits-s0"
    assert (folder / "results.json").is_file()
    assert (folder / "figures" / "overfitting.png").is_file()


def test_processes_that_claim_at_once_have_folders_of_their_own(tmp_path):
    paths = [tmp_path / "new" / "runs" / f"run-{number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: RunFolder.claim_first(paths), range(8)))
    assert sorted(folder.path for folder in claimed) == paths
    for folder in claimed[1:]:
        folder.discard()
    assert [*(tmp_path / "new" / "runs").iterdir()] == [claimed[0].path]
    claimed[0].discard()
    # The folder above stays if its maker discarded its own run first, while others were in it.
    assert set(everything()) <= {"new", "new/runs"}


def test_a_folder_is_left_to_the_run_that_started_in_it(tmp_path):
    own = RunFolder.claim(tmp_path / "runs" / "own")
    (own.path / "config.yaml").touch()
    own.discard()
    RunFolder(own.path).discard()
    assert (own.path / "config.yaml").is_file()
    with pytest.raises(FileExistsError):
        RunFolder.claim(own.path)


def test_a_start_that_is_refused_leaves_a_run_beside_it_alone(monkeypatch):
    class Nested(Callback):
        def on_train_start(self, trainer, pl_module):
            # Both have decided where to go, and neither has trained.
            assert Path("runs/AT-Digits-s0").is_dir()
            with pytest.raises(SystemExit):
                monkeypatch.undo()
                main(["fit", *TINY, OFFLINE, "--model.optimizer.lr=-1"])

    before = Path.cwd()
    add_callback(monkeypatch, Nested())
    main(["fit", *TINY, OFFLINE, f"--trainer.default_root_dir={before}/runs"])
    assert [path.name for path in (before / "runs").iterdir()] == ["AT-Digits-s0"]
    assert (before / "runs/AT-Digits-s0/results.json").is_file()


class Signal(Callback):
    """Sends a signal to this process."""

    def __init__(self, hook: str, number: signal.Signals, epoch: int = 1) -> None:
        self.number, self.epoch = number, epoch
        setattr(self, hook, self.send)

    def send(self, trainer, *args, **kwargs) -> None:
        if trainer.current_epoch >= self.epoch:
            os.kill(os.getpid(), self.number)
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_train_batch_start", signal.SIGTERM),
        ("on_train_batch_start", signal.SIGINT),
        # After training, where Lightning no longer handles signals.
        ("on_fit_end", signal.SIGTERM),
        ("on_fit_end", signal.SIGINT),
    ],
)
def test_a_signal_has_its_status_and_names_the_command_that_resumes(
    hook, number, monkeypatch, capsys
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        add_callback(patch, Signal(hook, number))
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *TINY, OFFLINE])
    assert stopped.value.code == 128 + number
    command = re.search("To resume the run: (.*)", capsys.readouterr().err)[1]
    assert not Path("runs/AT-Digits-s0/results.json").exists()
    main(shlex.split(command)[shlex.split(command).index("fit") :])
    assert Path("runs/AT-Digits-s0/results.json").is_file()
    assert [path.name for path in Path("runs").iterdir()] == ["AT-Digits-s0"]


@pytest.mark.parametrize("hook", ["setup", "on_train_start"])
def test_sigterm_before_the_first_batch_leaves_nothing(hook, monkeypatch, capsys):
    add_callback(monkeypatch, Signal(hook, signal.SIGTERM, epoch=0))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *TINY, OFFLINE])
    assert stopped.value.code == 143
    assert "To resume" not in capsys.readouterr().err
    assert everything() == [] or hook == "on_train_start"


@pytest.mark.slow
def test_a_process_that_is_terminated_says_how_to_go_on():
    endless = ["--trainer.max_epochs=1000", OFFLINE]
    command = [sys.executable, "-m", "robust_flatness.cli", "fit", *TINY, *endless]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("runs/AT-Digits-s0/checkpoints/last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    last = "runs/AT-Digits-s0/checkpoints/last.ckpt"
    expected = f"To resume the run: python -m robust_flatness.cli fit --ckpt_path {last}"
    assert said.decode().strip().splitlines()[-1] == expected
