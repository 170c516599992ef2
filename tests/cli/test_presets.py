"""Promise 11: a preset holds what its name says, checked on the objects that it builds."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robust_flatness import cli
from robust_flatness.callbacks import WeightAveraging, WeightClipping
from robust_flatness.command_line.files import CONFIGS
from robust_flatness.functional import PGD
from robust_flatness.lightning_modules import (
    AT,
    ATAWP,
    MART,
    TRADES,
    ATEntropySGD,
    ATSelfSupervision,
    ATUnlabeled,
    Cyclic,
    EntropySGD,
    MultiStep,
)

ROWS = sorted(path.stem for path in (CONFIGS / "table1").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.yaml"))
CIFAR = ("--data=CIFAR10", "--config=cifar10.yaml")
EPS = 8 / 255


class Run:
    """What a command line builds, without running it."""

    def __init__(self, built: cli.CLI) -> None:
        self.model: Any = built.model
        self.data: Any = built.datamodule
        self.trainer = built.trainer
        self.callbacks = {type(callback): callback for callback in built.trainer.callbacks}
        self.name = built.method
        self.model.trainer = built.trainer
        configured = self.model.configure_optimizers()
        self.optimizer: Any = configured["optimizer"]
        self.group = self.optimizer.param_groups[0]
        self.schedule: Any = configured["lr_scheduler"]["scheduler"]

    def facts(self) -> dict[str, Any]:
        """Everything that tells two runs apart."""
        averaging = self.callbacks.get(WeightAveraging)
        clipping = self.callbacks.get(WeightClipping)
        return {
            "model": (type(self.model), vars(self.model.pgd), vars(self.model.training_labels)),
            "lam": getattr(self.model, "lam", None),
            "xi": getattr(self.model, "xi", None),
            "optimizer": (type(self.optimizer), self.group["lr"], self.group["weight_decay"]),
            "walk": getattr(self.optimizer, "langevin_steps", None),
            "schedule": (type(self.schedule), getattr(self.schedule, "cycles", None)),
            "milestones": getattr(self.schedule, "milestones", None),
            "epochs": self.trainer.max_epochs,
            "batch": (self.data.batch_size, self.data.augment, self.data.unlabeled_share),
            "averaging": averaging and averaging.decay,
            "clipping": clipping and clipping.w_max,
            "network": str(self.model.network),
        }


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Builds what `fit` with some arguments would run."""

    def run(*arguments: str) -> Run:
        built: list[cli.CLI] = []
        monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, _: built.append(self))
        fixed = (f"--trainer.default_root_dir={tmp_path}", "--without=[wandb]")
        cli.main(["fit", *arguments, *fixed, "--trainer.accelerator=cpu"])
        return Run(built[0])

    return run


BUILT: dict[tuple[str, ...], Run] = {}


def row(build: Callable[..., Run], *name_and_arguments: str) -> Run:
    """A row of Table 1 in the paper's set-up, with a narrow network."""
    if name_and_arguments not in BUILT:
        name, *arguments = name_and_arguments
        narrow = "--model.network.width=4"
        BUILT[name_and_arguments] = build(
            *CIFAR, f"--config=table1/{name}.yaml", narrow, *arguments
        )
    return BUILT[name_and_arguments]


def baseline(run: Run) -> None:
    """Holds everything that no row changes."""
    assert run.model.pgd.steps == 7
    assert run.model.pgd.length == pytest.approx(0.007)
    assert run.trainer.max_epochs == 150
    assert run.data.batch_size == 128
    assert run.data.eps == pytest.approx(8 / 255)


def test_there_are_nineteen_rows():
    assert len(ROWS) == 19


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_and_runs_on_digits(build, name):
    run = build(f"--config=configs/table1/{name}.yaml")
    assert run.name == name
    assert type(run.data).__name__ == "Digits"
    assert run.data.eps == 0.2


def test_no_two_rows_are_alike(build):
    facts = {name: str(row(build, name).facts()) for name in ROWS}
    alike = [pair for pair in itertools.combinations(ROWS, 2) if facts[pair[0]] == facts[pair[1]]]
    assert alike == []


def test_at(build):
    run = row(build, "at")
    baseline(run)
    assert type(run.model) is AT
    assert run.model.pgd.eps == pytest.approx(8 / 255)
    assert type(run.optimizer) is torch.optim.SGD
    assert (run.group["lr"], run.group["momentum"]) == (0.05, 0.9)
    assert (run.group["weight_decay"], run.group["nesterov"]) == (5e-4, True)
    assert run.schedule.milestones == [0.4, 0.6, 0.8]
    assert type(run.model.network).__name__ == "ResNet18"
    assert run.data.augment == "flip_crop"


def test_at_awp(build):
    run = row(build, "at_awp")
    baseline(run)
    assert type(run.model) is ATAWP
    assert (run.model.xi, run.model.awp.steps, run.model.warmup) == (0.01, 1, 0.0)


@pytest.mark.parametrize(("name", "cls"), [("trades", TRADES), ("mart", MART)])
def test_trades_and_mart(build, name, cls):
    run = row(build, name)
    baseline(run)
    assert type(run.model) is cls
    assert run.model.lam == 6.0
    assert run.model.pgd.start == "paper"


def test_label_noise_and_smoothing(build):
    noisy, smooth = row(build, "label_noise"), row(build, "label_smoothing")
    assert (noisy.model.training_labels.noise, noisy.model.training_labels.smoothing) == (0.3, 0.0)
    labels = smooth.model.training_labels
    assert (labels.noise, labels.smoothing, labels.spread) == (0.0, 0.3, "all")


def test_larger_eps(build):
    run = row(build, "larger_eps")
    baseline(run)
    assert run.model.pgd.eps == pytest.approx(9 / 255)


def test_weight_decay(build):
    run = row(build, "weight_decay")
    assert run.group["weight_decay"] == 0.05
    assert (run.group["lr"], run.group["momentum"], run.group["nesterov"]) == (0.05, 0.9, True)


@pytest.mark.parametrize(("name", "layer"), [("mish", "Mish"), ("silu", "SiLU"), ("gelu", "GELU")])
def test_activations(build, name, layer):
    names = [type(module).__name__ for module in row(build, name).model.network.modules()]
    assert layer in names
    assert "ReLU" not in names


def test_late_multi_step(build):
    schedule = row(build, "late_multi_step").schedule
    rates = []
    for _ in range(150):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    assert [epoch for epoch in range(1, 150) if rates[epoch] != rates[epoch - 1]] == [140, 145]


def test_cyclic(build):
    run = row(build, "cyclic")
    assert type(run.schedule) is Cyclic
    assert run.trainer.max_epochs == 60
    assert (run.schedule.cycles, run.schedule.max_lrs) == (2, [0.2])
    assert run.schedule.cycle_momentum
    fixed = row(build, "cyclic", "--model.lr_scheduler.cycle_momentum=false")
    assert not fixed.schedule.cycle_momentum


def test_weight_averaging(build):
    averaging = row(build, "weight_averaging").callbacks[WeightAveraging]
    assert (averaging.decay, averaging.reference_steps) == (0.9975, 58_650)


def test_weight_clipping(build):
    assert row(build, "weight_clipping").callbacks[WeightClipping].w_max == 0.005
    assert WeightClipping not in row(build, "at").callbacks


def test_autoaugment(build):
    assert row(build, "autoaugment").data.augment == "autoaugment"


def test_self_supervision(build):
    run = row(build, "self_supervision")
    baseline(run)
    assert type(run.model) is ATSelfSupervision
    assert (run.model.lam, run.model.rotations, run.model.fraction) == (4.0, "half", 0.5)


def test_unlabeled(build):
    run = row(build, "unlabeled")
    assert type(run.model) is ATUnlabeled
    assert (run.model.loss, run.data.unlabeled_share) == ("at", 0.5)


def test_entropy_sgd(build):
    run = row(build, "entropy_sgd")
    baseline(run)
    assert type(run.model) is ATEntropySGD
    assert type(run.optimizer) is EntropySGD
    assert (run.optimizer.langevin_steps, run.optimizer.langevin_lr) == (1, 0.1)
    assert (run.optimizer.noise, run.optimizer.gamma) == (1e-4, 1e-4)
    assert (run.group["lr"], run.group["momentum"]) == (0.05, 0.0)
    assert isinstance(run.schedule, MultiStep)
    assert run.schedule.milestones == []


def commands(sweep: str) -> list[list[str]]:
    """The arguments that W&B's agent would give to each run of a sweep file."""
    content = yaml.safe_load((CONFIGS / "sweeps" / f"{sweep}.yaml").read_text())
    assert content["method"] == "grid"
    assert content["program"] == "cli.py"
    assert content["command"][:4] == ["${env}", "${interpreter}", "${program}", "fit"]
    assert content["command"][-1] == "${args}"
    names, values = zip(*((k, v["values"]) for k, v in content["parameters"].items()))
    return [
        [*content["command"][4:-1], *(f"--{name}={value}" for name, value in zip(names, chosen))]
        for chosen in itertools.product(*values)
    ]


def swept(build: Callable[..., Run], sweep: str, fact: Callable[[Run], Any]) -> list[Any]:
    return [fact(build(*CIFAR, *arguments)) for arguments in commands(sweep)]


@pytest.mark.parametrize(
    ("sweep", "fact", "values"),
    [
        ("label_noise", lambda run: run.model.training_labels.noise, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("weight_decay", lambda run: run.group["weight_decay"], [0.0, 0.001, 0.005, 0.01, 0.05]),
        ("self_supervision", lambda run: run.model.lam, [0.5, 1, 2, 4, 8]),
        ("trades", lambda run: run.model.lam, [1, 3, 6, 9]),
        ("mart", lambda run: run.model.lam, [1, 3, 6, 9]),
        ("at_awp", lambda run: run.model.xi, [0.001, 0.005, 0.01]),
        ("label_smoothing", lambda run: run.model.training_labels.smoothing, [0.1, 0.2, 0.3]),
        ("weight_clipping", lambda r: r.callbacks[WeightClipping].w_max, [0.005, 0.01, 0.025]),
        (
            "weight_averaging",
            lambda run: run.callbacks[WeightAveraging].decay,
            [0.98, 0.985, 0.99, 0.9975],
        ),
        ("entropy_sgd", lambda run: run.optimizer.langevin_steps, [1, 2, 3, 5]),
        ("batch_size", lambda run: run.data.batch_size, [8, 16, 32, 64, 256, 512]),
        ("learning_rate", lambda run: run.group["lr"], [0.01, 0.1, 0.2]),
        (
            "constant_rate",
            lambda run: (run.group["lr"], run.schedule.milestones),
            [(0.05, []), (0.01, []), (0.005, [])],
        ),
        ("attack_steps", lambda run: run.model.pgd.steps, [5, 14]),
        ("pgd_tau", lambda run: run.model.pgd.tau, [0, 1, 2, 3]),
        (
            "fgsm_rs",
            lambda run: run.model.pgd,
            [
                PGD(EPS, 1, step, keep="last", start="uniform", mode="train")
                for step in (8 / 255, 10 / 255, 16 / 255)
            ],
        ),
        (
            "n_fgsm",
            lambda run: run.model.pgd,
            [
                PGD(
                    *(EPS, 1, EPS, "linf", "last", "uniform", "train"),
                    start_scale=k,
                    projection=False,
                )
                for k in (0.5, 1.0, 2.0, 3.0)
            ],
        ),
        (
            "cyclic",
            lambda run: (run.schedule.cycles, run.trainer.max_epochs),
            [(1, 30), (2, 60), (3, 90), (4, 120)],
        ),
    ],
)
def test_a_sweep_reaches_the_built_objects(build, sweep, fact, values):
    assert swept(build, sweep, fact) == values
    assert len({str(value) for value in values}) == len(values)


def test_every_sweep_is_checked_above():
    marks = test_a_sweep_reaches_the_built_objects.pytestmark
    assert sorted(case[0] for case in marks[0].args[1]) == SWEEPS


def test_rows_combine(build):
    files = ("label_noise", "weight_averaging", "at_awp")
    run = build(*(f"--config=table1/{name}" for name in files), "--name=all_three")
    assert run.name == "all_three"
    assert type(run.model) is ATAWP
    assert run.model.training_labels.noise == 0.3
    assert WeightAveraging in run.callbacks


def test_what_is_typed_wins_over_a_row(build):
    run = build("--model.lam=2", "--config=table1/trades.yaml", "--trainer.max_epochs=3")
    assert (run.model.lam, run.trainer.max_epochs) == (2, 3)
    assert build("--epochs_share=0.5", "--config=table1/cyclic").trainer.max_epochs == 12
