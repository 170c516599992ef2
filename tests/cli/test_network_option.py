"""Networks of the user's own on the command line."""

import re
import sys

import pytest
import yaml
from torch import nn

from robust_flatness import cli
from robust_flatness.cli import main
from robust_flatness.lightning_modules import AT
from robust_flatness.networks import ResNet18, WideResNet

NETS = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__()
        self.width = width
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
    def forward(self, x): return self.body(x)
class One(Net):
    def __init__(self, num_classes, width=4): super().__init__(num_classes, 1, width)
class Nothing(Net):
    def __init__(self): super().__init__(10, 1)
def make(num_classes, in_channels, width=4): return Net(num_classes, in_channels, width)
class Outputs(Net):
    def __init__(self): super().__init__(1000, 1)
class Fewer(Net):
    def __init__(self): super().__init__(7, 1)
class Colour(Net):
    def __init__(self): super().__init__(10, 3)
class Other: pass
"""
BROKEN = "import a_package_that_is_missing\n"
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--model.steps=1"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
LEFT_OUT = ["evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping"]
LEFT_OUT += ["trajectory", "final", "autoattack", "wandb"]
BARE = [*SMALL, f"--without=[{','.join(LEFT_OUT)}]"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to work in, whose modules may be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "broken_nets.py").write_text(BROKEN)
    yield tmp_path
    for name in ("own_nets", "broken_nets"):
        sys.modules.pop(name, None)


def built(*options):
    """The model of a command, and what is written into its config.yaml."""
    seen = []

    class Building(cli.CLI):
        def _run_subcommand(self, subcommand):
            seen.extend((self.model, self.config_dump))

    main(["fit", *BARE, *options], cli_class=Building)
    return seen


@pytest.mark.parametrize(
    ("options", "kind", "width"),
    [
        (["own_nets.Net"], "Net", 4),
        (["own_nets.Net", "--data=CIFAR10"], "Net", 4),
        (["own_nets.Net", "--model.network.width=8"], "Net", 8),
        (["own_nets.One"], "One", 4),
        (["own_nets.One", "--model.network.init_args.width=8"], "One", 8),
        (["own_nets.Nothing"], "Nothing", 4),
        (["own_nets.make"], "Net", 4),
        (["own_nets.make", "--model.network.width=8", "--model=ATAWP"], "Net", 8),
        (["own_nets.make", "--model.network.width=null"], "Net", None),
        (["own_nets.make", "--model.network.width={a: {b: 1}}"], "Net", {"a": {"b": 1}}),
        (["own_nets.make", "--model.network.width.a=[1]"], "Net", {"a": [1]}),
    ],
)
def test_classes_and_factories_of_any_constructor_are_built(options, kind, width, project):
    # `width` is also an argument of the preset's network and of the default one.
    model, _ = built("--model.network", *options)
    assert type(model.network).__name__ == kind
    assert model.network.width == width


def test_a_network_in_a_file_and_its_arguments_on_top(project):
    (project / "mine.yaml").write_text(
        "model: {init_args: {network: {class_path: own_nets.One, init_args: {width: 6}}}}\n"
    )
    (project / "short.yaml").write_text("model: {init_args: {network: own_nets.One}}\n")
    model, written = built("--config=mine.yaml")
    assert model.network.width == 6
    assert built("--config=mine.yaml", "--model.network.width=7")[0].network.width == 7
    assert built("--config=short.yaml")[0].network.width == 4
    # What is written down builds the same again, with changes on top.
    again = {"model": {"init_args": {"network": written["model"]["init_args"]["network"]}}}
    (project / "again.yaml").write_text(yaml.safe_dump(again))
    assert built("--config=again.yaml")[0].network.width == 6
    assert built("--config=again.yaml", "--model.network.width=7")[0].network.width == 7


def test_another_network_of_the_package_has_its_own_width_but_the_files_activation(project):
    model, written = built("--model.network=ResNet18", "--config=table1/silu.yaml")
    assert isinstance(model.network, ResNet18)
    assert written["model"]["init_args"]["network"]["init_args"]["width"] == 64
    assert any(isinstance(layer, nn.SiLU) for layer in model.network.modules())
    model, _ = built("--model.network=WideResNet", "--model.network.depth=10", "--data=CIFAR10")
    assert isinstance(model.network, WideResNet)
    _, written = built("--model.network=SmallResNet", "--data=CIFAR10")
    assert written["model"]["init_args"]["network"]["init_args"]["width"] == 16


def test_a_run_is_resumed_and_tested_with_its_network(project):
    options = ["--model.network=own_nets.make", "--model.network.width=8", "--folder=run"]
    main(["fit", *BARE, *options])
    last = "--ckpt_path=run/checkpoints/last.ckpt"
    main(["fit", *BARE, last, "--trainer.max_epochs=2"])
    final = ["--final.num_examples=4", "--final.steps=1", "--final.restarts=1"]
    main(["test", "--without=[autoattack]", *final, "--final.num_perturbations=0", last])
    assert (project / "run" / "results_test.json").is_file()
    module = AT.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert type(module.network).__name__ == "Net"
    assert module.network.width == 8


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (["own_nets.Other"], "but got own_nets.Other, a class of another kind"),
        (["own_nets.Nett"], "but got own_nets.Nett: own_nets has no Nett"),
        (["own_net.Net"], "but got own_net.Net: there is no module named own_net"),
        (["broken_nets.Net"], "broken_nets.Net to import but .*'a_package_that_is_missing'"),
        (["own_nets.One", "--model.network.widht=3"], "unexpected keyword argument 'widht'"),
        (["own_nets.Outputs"], "network` to return 10 logits, one for each class, but got 1000"),
        (["own_nets.Fewer"], "network` to return 10 logits, one for each class, but got 7"),
        (["own_nets.Colour"], r"images of shape \(1, 8, 8\) but it raises RuntimeError"),
        (["torch.nn.Linear"], r"images of shape \(1, 8, 8\) but it raises RuntimeError"),
        (["torchvision.models.resnet18"], r"images of shape \(1, 8, 8\) but it raises Runtime"),
        (["torch.nn.Identity"], "network` to have weights to train but Identity has none"),
        (["3"], "`--model.network` to be a class path such as package.Class but got 3"),
        (["null"], "or a function that builds one, but got None"),
    ],
)
def test_a_wrong_network_ends_in_a_sentence_and_leaves_nothing(network, message, project, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *BARE, "--model.network", *network])
    assert exit_.value.code == 2
    said = capsys.readouterr().err.partition("error: ")[2]
    assert re.search(message, said), said
    assert len(said.strip().splitlines()) == 1
    assert not list(project.glob("runs/*"))
