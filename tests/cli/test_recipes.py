"""What the presets of other papers promise, checked on the built objects."""

import pytest
import torch
from test_presets import EPS, build  # noqa: F401

from robust_flatness.callbacks import RobustEarlyStopping, WeightAveraging
from robust_flatness.command_line.files import CONFIGS
from robust_flatness.functional import PGD
from robust_flatness.lightning_modules import AT, ATUnlabeled
from robust_flatness.networks import ResNet18, WideResNet28x10, WideResNet34x10

RECIPES = {"rice2020", "pang2021", "wang2023"}
ATTACK = {"step_size": 2 / 255, "keep": "last", "start": "uniform"}


@pytest.fixture
def recipe(build, monkeypatch):  # noqa: F811
    """Builds a recipe without allocating its network."""

    def run(name):
        for network in (ResNet18, WideResNet28x10, WideResNet34x10):
            monkeypatch.setattr(network, "__init__", lambda self, *a, **k: self.small(a, k))
            monkeypatch.setattr(network, "small", small, raising=False)
        return build("--config=cifar10.yaml", f"--config=recipes/{name}.yaml")

    return run


def small(network, arguments, settings):
    torch.nn.Module.__init__(network)
    network.layer, network.settings = torch.nn.Linear(1, 1), (arguments, settings)


def rates(run):
    """The learning rate of each epoch."""
    if hasattr(run.schedule, "total"):
        run.schedule.total = run.trainer.max_epochs
    values = []
    for _ in range(run.trainer.max_epochs):
        values.append(run.group["lr"])
        run.optimizer.step()
        run.schedule.step()
    return values


def test_there_are_three_recipes():
    assert {path.stem for path in (CONFIGS / "recipes").glob("*.yaml")} == RECIPES


@pytest.mark.parametrize(
    ("name", "network", "settings", "mode", "epochs", "drops"),
    [
        ("rice2020", ResNet18, {"preactivation": True}, "train", 200, (100, 150)),
        ("pang2021", WideResNet34x10, {}, "eval", 110, (100, 105)),
    ],
)
def test_adversarial_training(recipe, name, network, settings, mode, epochs, drops):
    run = recipe(name)
    assert run.name == name
    assert type(run.model) is AT
    assert type(run.model.network) is network
    assert run.model.network.settings[1].items() >= {"norm": "batch", **settings}.items()
    assert run.model.pgd == PGD(EPS, 10, mode=mode, **ATTACK)
    assert run.model.training_labels.smoothing == 0
    assert (run.data.batch_size, run.data.augment) == (128, "flip_crop")
    assert (run.group["momentum"], run.group["nesterov"]) == (0.9, False)
    assert run.group["weight_decay"] == 5e-4
    assert WeightAveraging not in run.callbacks
    first, second = drops
    expected = [0.1] * first + [0.01] * (second - first) + [0.001] * (epochs - second)
    assert rates(run) == pytest.approx(expected)


def test_wang2023(recipe):
    run = recipe("wang2023")
    assert type(run.model) is ATUnlabeled
    assert (run.model.loss, run.model.lam) == ("trades", 5)
    labels = run.model.training_labels
    assert (labels.smoothing, labels.spread) == (0.1, "all")
    assert type(run.model.network) is WideResNet28x10
    assert run.model.network.settings[1].items() >= {"activation": "silu", "norm": "batch"}.items()
    assert run.model.pgd == PGD(EPS, 10, **ATTACK)
    assert (run.data.batch_size, run.data.unlabeled_share) == (512, 0.7)
    assert (run.data.sizes.num_val, run.data.sizes.val_from) == (1024, "train")
    averaging = run.callbacks[WeightAveraging]
    assert (averaging.decay, averaging.reference_steps) == (0.995, None)
    early = run.callbacks[RobustEarlyStopping]
    assert (early.measure.steps, early.measure.step_size) == (40, 2 / 255)
    assert (early.num_examples, early.every_n_epochs) == (1024, 1)
    assert run.group["weight_decay"] == 5e-4
    assert run.group["nesterov"] is True
    epochs = rates(run)
    assert len(epochs) == 400
    assert epochs[9] == max(epochs) == pytest.approx(0.2)
    assert epochs[0] == pytest.approx(0.2 / 25)
    assert epochs[-1] < 1e-5


def test_preactivation_has_the_parameters_of_rice_et_al():
    network = ResNet18(10, preactivation=True, norm="batch")
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_172_170
    assert [type(layer).__name__ for layer in network.body][-3:] == [
        *("PreactivationBlock", "BatchNorm2d", "ReLU")
    ]
    assert network.body[0].bias is None
