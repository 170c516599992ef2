"""The command line, driven in-process, and promises 10, 12 and 13 on it."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from robust_flatness import cli
from robust_flatness.cli import CLI, main
from robust_flatness.lightning_modules import AT, ATAWP, load_checkpoint

# A whole run in two seconds: few images, few steps, no W&B.
TINY = [
    "--trainer.max_epochs=2",
    "--data.num_train=64",
    "--model.network.width=4",
    "--model.steps=2",
    "--trainer.enable_progress_bar=false",
    "--evaluation.num_examples=8",
    "--train_evaluation.num_examples=8",
    "--flatness.num_examples=8",
    "--train_flatness.num_examples=8",
    "--early_stopping.num_examples=8",
    "--final.num_examples=8",
    "--final.steps=2",
    "--final.restarts=2",
    "--final.num_perturbations=2",
    "--autoattack.num_examples=4",
    "--autoattack.version=custom",
    "--autoattack.attacks=[apgd-ce]",
]
QUIET = "--without=[wandb]"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the command line makes."""
    made = []
    build = CLI.instantiate_trainer

    def remember(self, **kwargs):
        made.append(build(self, **kwargs))
        return made[-1]

    monkeypatch.setattr(CLI, "instantiate_trainer", remember)
    return made


def parsed(*arguments: str, capsys) -> dict:
    """The configuration that a command would run with."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(*arguments: str, capsys) -> str:
    """What a command says that is refused, before anything is written."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    assert not list(Path().glob("runs/*/checkpoints/*"))
    return " ".join(capsys.readouterr().err.split())


def test_fit_leaves_a_run_folder_as_the_design_says(trainers, capsys):
    main(["fit", "--model", "ATAWP", *TINY, QUIET])
    folder = Path("runs/ATAWP-Digits-s0")
    for name in ("config.yaml", "metrics.csv", "results.json"):
        assert (folder / name).is_file()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {p.name for p in (folder / "figures").iterdir()} == {"trajectory.png", "overfitting.png"}
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["data"], results["seed"]) == ("ATAWP", "Digits", 0)
    for part in ("final", "early_stopped"):
        assert {
            "test/robust_error",
            "test/robust_loss",
            "test/autoattack_error",
            "flatness/average/test",
            "flatness/average/train_sem",
        } <= set(results[part])
    assert results["num_examples"]["test/autoattack_error"] == 4
    assert [row["epoch"] for row in results["trajectory"]] == [0, 1]
    assert results["settings"]["model"]["init_args"]["xi"] == 0.01
    assert len(results["split_indices"]["val"]) == 500
    assert not any("dummy" in str(logger).lower() for logger in trainers[0].loggers)
    printed = capsys.readouterr().out
    assert "RErr APGD-CE, test (n=4)" in printed
    assert "runs/ATAWP-Digits-s0" in printed
    assert type(load_checkpoint(folder / "checkpoints" / "best.ckpt")) is ATAWP


def test_version_is_that_of_the_distribution(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"robust-flatness {version('robust-flatness')}\n"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("command", ["fit", "test"])
def test_help_fits_a_terminal_and_begins_with_what_the_command_does(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help", "all"])
    assert ended.value.code == 0
    usage, _empty, first, *lines = capsys.readouterr().out.splitlines()
    assert usage == f"usage: cli.py {command} [--model NAME] [--config FILE] [options]"
    assert first.startswith(("Trains one model", "Measures a checkpoint"))
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert {"Training method:", "train_flatness (Flatness):", "Checkpoint:"} <= set(titles)
    assert all(len(line) <= 80 for line in titles)


@pytest.mark.parametrize("arguments", [[], ["trainer"], ["flatness"], ["final"], ["model"]])
def test_help_of_a_group_fits_a_screen_and_options_exist(arguments, capsys):
    with suppress(SystemExit):
        main(["fit", "--help", *arguments])
    lines = capsys.readouterr().out.splitlines()
    # The trainer has 42 arguments.
    assert len(lines) <= (95 if arguments == ["trainer"] else 50)
    assert all(len(line) <= 80 for line in lines)
    if not arguments:
        known = {"--help", "--model.help", "--data.help", "--version"}
        main_help = " ".join(lines)
        with pytest.raises(SystemExit):
            main(["fit", "--help", "all"])
        text = capsys.readouterr().out
        for name in re.findall(r"--[a-z_.]+[a-z]", main_help):
            assert name in known or name in text or name.startswith(("--model.", "--data.")), name


def test_help_of_a_class_option_lists_the_classes(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help"])
    printed = capsys.readouterr().out
    assert "  ATAWP " in printed
    assert "arguments of one: " in printed


def test_a_taken_name_gets_a_number(trainers):
    Path("runs/AT-Digits-s0").mkdir(parents=True)
    main(["fit", *TINY, QUIET])
    assert Path("runs/AT-Digits-s0-2/results.json").is_file()
    assert list(Path("runs/AT-Digits-s0").iterdir()) == []


def test_test_measures_a_checkpoint_with_the_settings_of_its_run(trainers):
    main(["fit", "--model", "ATAWP", "--model.eps=0.1", *TINY, QUIET])
    folder = Path("runs/ATAWP-Digits-s0")
    before = {
        name: (folder / name).read_bytes()
        for name in ("config.yaml", "metrics.csv", "results.json")
    }
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    main(["test", "--model", "ATAWP", "--ckpt_path", checkpoint, "--trainer.logger=false"])
    tested = json.loads((folder / "results_test.json").read_text())
    fitted = json.loads((folder / "results.json").read_text())
    assert tested["settings"]["model"]["init_args"]["eps"] == 0.1
    assert tested["settings"]["model"]["init_args"]["network"]["init_args"]["width"] == 4
    for part in ("final", "early_stopped"):
        for name, value in tested[part].items():
            assert fitted[part][name] == pytest.approx(value, abs=1e-6), name
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    assert [p.name for p in Path("runs").iterdir()] == ["ATAWP-Digits-s0"]


def test_a_test_of_other_weights_has_a_file_and_a_heading_of_its_own(trainers, capsys):
    main(["fit", "--model", "AT", *TINY, QUIET])
    folder = Path("runs/AT-Digits-s0")
    for name in ("last", "best"):
        main(["test", "--model=AT", f"--ckpt_path={folder}/checkpoints/{name}.ckpt", QUIET])
        heading = " ".join(capsys.readouterr().out.split())
        assert ("best.ckpt" in heading) == (name == "best")
        # One table, ours.
        assert heading.count("RErr PGD, test (n=") == 1 + (name == "last")
        assert "Test metric" not in heading
    files = {path.name for path in folder.glob("results*.json")}
    assert files == {"results.json", "results_test.json", "results_best.json"}
    assert json.loads((folder / "results_best.json").read_text())["checkpoint"] == "best"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "ATAWP", "--model.xi", "0.02"],
        ["--model.xi", "0.02", "--model", "ATAWP"],
        ["--model.xi=0.02", "--trainer.max_epochs=7", "--model=ATAWP"],
    ],
)
def test_order_of_arguments_does_not_matter(arguments, capsys):
    config = parsed("fit", *arguments, capsys=capsys)
    assert config["model"]["class_path"].endswith(".ATAWP")
    assert config["model"]["init_args"]["xi"] == 0.02


def test_fractions_are_numbers_wherever_an_epsilon_is(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("flatness: {eps: 4/255, step_size: 1/255}\n")
    config = parsed(
        "fit", "--model.eps", "8/255", "--data.eps=1/5", "--config", str(mine), capsys=capsys
    )
    assert config["model"]["init_args"]["eps"] == pytest.approx(8 / 255)
    assert config["data"]["init_args"]["eps"] == 0.2
    assert config["flatness"]["eps"] == pytest.approx(4 / 255)
    assert config["flatness"]["step_size"] == pytest.approx(1 / 255)
    assert "8/0" in refused("fit", "--model.eps=8/0", capsys=capsys)


def test_digits_and_cifar_bring_their_own_settings(capsys):
    digits = parsed("fit", capsys=capsys)
    assert digits["model"]["init_args"]["eps"] == 0.2
    assert digits["model"]["init_args"]["network"]["class_path"].endswith(".SmallResNet")
    cifar = parsed("fit", "--data", "CIFAR10", capsys=capsys)
    assert cifar["model"]["init_args"]["eps"] == pytest.approx(8 / 255)
    assert cifar["model"]["init_args"]["network"]["class_path"].endswith(".ResNet18")
    assert cifar["trainer"]["max_epochs"] == 150
    assert cifar["data"]["init_args"]["batch_size"] == 128


def test_the_papers_set_up_holds_what_its_name_says(capsys):
    path = str(Path(cli.__file__).parent / "configs" / "cifar10.yaml")
    config = parsed("fit", "--config", path, "--model", "ATAWP", capsys=capsys)
    model, optimizer = config["model"]["init_args"], config["model"]["init_args"]["optimizer"]
    assert config["model"]["class_path"].endswith(".ATAWP")
    assert config["data"]["class_path"].endswith(".CIFAR10")
    assert (model["xi"], model["awp_steps"], model["steps"]) == (0.01, 1, 7)
    assert model["eps"] == pytest.approx(8 / 255)
    assert model["lr_scheduler"]["init_args"] == {"milestones": [0.4, 0.6, 0.8], "gamma": 0.1}
    assert optimizer["init_args"]["lr"] == 0.05
    assert optimizer["init_args"]["nesterov"]
    assert optimizer["init_args"]["weight_decay"] == 5e-4
    stopping = config["early_stopping"]
    assert (stopping["steps"], stopping["restarts"], stopping["every_n_epochs"]) == (7, 5, 5)
    assert stopping["num_examples"] == 500
    final = config["final"]
    assert (final["num_examples"], final["steps"], final["restarts"]) == (1000, 20, 10)
    assert (final["num_perturbations"], final["xi"]) == (10, 0.5)
    flatness = config["flatness"]
    assert (flatness["num_examples"], flatness["steps"]) == (1000, 20)
    assert config["autoattack"]["version"] == "standard"


def test_the_digits_preset_has_a_full_version(capsys):
    small = parsed("fit", "--model", "ATAWP", capsys=capsys)
    full = parsed("fit", "--model", "ATAWP", "--config", "digits_full.yaml", capsys=capsys)
    for name in ("model", "data", "trainer", "seed_everything"):
        assert full[name] == small[name]
    final = full["final"]
    assert (final["steps"], final["restarts"], final["num_perturbations"]) == (20, 10, 10)
    assert final["extras"] == ["worst"]
    assert (full["autoattack"]["version"], full["autoattack"]["attacks"]) == ("standard", None)
    # All images that there are.
    assert final["num_examples"] == full["autoattack"]["num_examples"] == 600
    assert full["data"]["init_args"]["num_test"] == 600
    assert full["flatness"]["every_n_epochs"] == full["evaluation"]["every_n_epochs"] == 1


def test_short_names_choose_networks_optimizers_and_callbacks(trainers):
    main(
        [
            "fit",
            *[argument for argument in TINY if "network" not in argument],
            "--without=[wandb,final,autoattack,trajectory,flatness]",
            "--model.network=WideResNet",
            "--model.network.depth=10",
            "--model.network.widen_factor=1",
            "--model.network.activation=silu",
            "--model.optimizer=Adam",
            "--model.optimizer.lr=0.01",
            "--model.lr_scheduler=CosineAnnealingLR",
            "--model.lr_scheduler.T_max=2",
            "--trainer.callbacks+=LearningRateMonitor",
        ]
    )
    (trainer,) = trainers
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert "LearningRateMonitor" in names
    assert "RobustEarlyStopping" in names
    assert not {"Trajectory", "AutoAttack", "FinalEvaluation"} & set(names)
    assert names.count("Flatness") == 1
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    assert type(trainer.lightning_module.network).__name__ == "WideResNet"


def test_default_callbacks_are_adjusted_by_name(trainers):
    main(["fit", *TINY, QUIET, "--flatness.every_n_epochs=5", "--train_flatness.xi=0.25"])
    flatness = [c for c in trainers[0].callbacks if type(c).__name__ == "Flatness"]
    assert [(c.split, c.every_n_epochs, c.measure.xi) for c in flatness] == [
        ("test", 5, 0.5),
        ("train", 20, 0.25),
    ]


def test_a_checkpoint_of_another_class_is_refused(trainers, capsys):
    main(["fit", "--model", "AT", *TINY, "--without=[wandb,final,autoattack]"])
    checkpoint = "runs/AT-Digits-s0/checkpoints/last.ckpt"
    with pytest.raises(SystemExit):
        main(["test", "--model", "ATAWP", "--ckpt_path", checkpoint])
    said = " ".join(capsys.readouterr().err.split())
    assert "`--model` to be AT, which wrote the checkpoint, but got ATAWP" in said
    Path("moved.ckpt").write_bytes(Path(checkpoint).read_bytes())
    with pytest.raises(SystemExit):
        main(["test", "--model", "ATAWP", "--ckpt_path", "moved.ckpt"])
    said = " ".join(capsys.readouterr().err.split())
    assert "`--model` to be AT, which wrote the checkpoint, but got ATAWP" in said


def test_a_checkpoint_outside_a_run_folder_brings_its_own_network(trainers):
    main(["fit", "--model", "ATAWP", *TINY, "--without=[wandb,final,autoattack]"])
    saved = Path("runs/ATAWP-Digits-s0/checkpoints/last.ckpt")
    Path("moved.ckpt").write_bytes(saved.read_bytes())
    # Everything but the network's width, which the checkpoint knows.
    rest = [a for a in TINY if "width" not in a and "max_epochs" not in a]
    main(["test", "--model", "ATAWP", "--ckpt_path", "moved.ckpt", *rest, "--without=autoattack"])
    tested = json.loads(Path("runs/ATAWP-Digits-s0-2/results_test.json").read_text())
    assert 0 <= tested["final"]["test/robust_error"] <= 1


def test_the_subcommand_comes_first_and_test_needs_a_checkpoint(capsys):
    assert "to come first" in refused("--seed_everything=1", "fit", capsys=capsys)
    assert "name a checkpoint to test but got none" in refused("test", capsys=capsys)
    every = "Expected one of fit, test, study, report, dashboard to come first but got "
    assert every + "nothing." in refused(capsys=capsys)
    assert every + "ft." in refused("ft", "--model=AT", capsys=capsys)


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", ["last", "best", "broken.ckpt", "results.json"])
def test_what_is_no_checkpoint_is_refused(command, path, capsys):
    # Lightning would measure an untrained network where it finds no `last`.
    Path("results.json").write_text("{}")
    Path("broken.ckpt").write_bytes(b"PK and no more")
    said = refused(command, f"--ckpt_path={path}", capsys=capsys)
    assert "Expected `--ckpt_path` to be a checkpoint" in said
    assert path in said
    assert "weights_only" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_one_sentence(capsys):
    said = refused("fit", *TINY, QUIET, "--trainer.accelerator=gpu", capsys=capsys)
    assert "Traceback" not in said
    assert "gpu" in said


def test_bad_images_found_in_fit_are_one_sentence_and_leave_no_folder(capsys, monkeypatch):
    def offline(self):
        raise ConnectionError("Expected the network to download but got none.")

    monkeypatch.setattr("robust_flatness.datamodules.Digits.prepare_data", offline)
    said = refused("fit", *TINY, QUIET, capsys=capsys)
    assert "download" in said
    assert not list(Path().glob("runs/*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write_is_named(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    said = refused("fit", *TINY, "--trainer.default_root_dir=locked", capsys=capsys)
    assert "locked" in said


def test_runs_cannot_be_written_where_a_file_stands(tmp_path, capsys):
    Path("taken").write_text("a file")
    said = refused("fit", *TINY, QUIET, "--trainer.default_root_dir=taken", capsys=capsys)
    assert "taken" in said


class Kill(Callback):
    """Ends the process as a power cut would, when an epoch starts."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: AT) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


RESUME = [
    "fit",
    "--model=ATAWP",
    *[argument for argument in TINY if "max_epochs" not in argument],
    "--trainer.max_epochs=4",
    "--without=[wandb,final,autoattack]",
]


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path):
    script = tmp_path / "killed.py"
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    script.write_text(
        f"import sys; sys.path[:0] = {folders}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from test_cli import RESUME, Kill, CLI, main\n"
        "build = CLI.instantiate_trainer\n"
        "def instantiate(self, **kwargs):\n"
        "    trainer = build(self, **kwargs)\n"
        "    trainer.callbacks.append(Kill(2))\n"
        "    return trainer\n"
        "CLI.instantiate_trainer = instantiate\n"
        "sys.argv = ['cli.py']\n"
        "main([*RESUME, '--trainer.default_root_dir=killed'])\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    killed, whole = Path("killed/ATAWP-Digits-s0"), Path("whole/ATAWP-Digits-s0")
    assert len((killed / "metrics.csv").read_text().splitlines()) == 3
    main(
        [
            *RESUME,
            "--trainer.default_root_dir=killed",
            f"--ckpt_path={killed}/checkpoints/last.ckpt",
        ]
    )
    main([*RESUME, "--trainer.default_root_dir=whole"])
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    saved = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (killed, whole)
    ]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert str(saved[0][key]) == str(saved[1][key]), key
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name]), name
    best = [
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
        for folder in (killed, whole)
    ]
    assert best[0] == best[1]
    stopping = [checkpoint["callbacks"]["RobustEarlyStopping[val]"] for checkpoint in saved]
    assert stopping[0]["trajectory"] == stopping[1]["trajectory"]
    assert stopping[0]["best_epoch"] == stopping[1]["best_epoch"]
    assert [p.name for p in Path("killed").iterdir()] == ["ATAWP-Digits-s0"]


@pytest.mark.slow
def test_offline_wandb_run_holds_curves_trajectory_and_settings():
    import wandb
    from wandb_reader import read_runs

    main(["fit", "--model", "ATAWP", *TINY])
    wandb.finish()
    (run,) = read_runs(Path("runs/ATAWP-Digits-s0"))
    logged = {name for step in run.history for name in step}
    assert {
        "train/robust_loss",
        "test/robust_loss",
        "test/robust_loss_correct",
        "train_eval/robust_error",
        "val/robust_error",
        "flatness/average/test",
        "awp/relative_norm_max",
    } <= logged
    assert run.config["model"]["init_args"]["xi"] == 0.01
    assert run.summary["final/test/robust_error"] >= 0
    epochs = [step["epoch"] for step in run.history if "test/robust_loss" in step]
    assert epochs == [0, 1]
