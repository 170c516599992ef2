"""Networks that were trained elsewhere."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network

from robust_flatness.callbacks import FinalEvaluation, evaluate
from robust_flatness.cli import main
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import External
from robust_flatness.networks import SmallResNet

LIGHT = ["--final.num_examples=8", "--final.restarts=1", "--final.steps=2"]
LIGHT += ["--final.num_perturbations=1", "--without=[autoattack]", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("prefix", ["", "module.", "network.", "module.model."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict"])
def test_a_state_dict_is_loaded_whatever_wrapped_it(prefix, key, tmp_path):
    source, images = tiny_network(seed=3).eval(), images_and_labels()[0]
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "a.pt")
    module = External(tiny_network(seed=4), str(tmp_path / "a.pt")).eval()
    assert torch.equal(module(images), source(images))


def test_a_torchscript_file_needs_no_network(tmp_path):
    source, images = tiny_network().eval(), images_and_labels()[0]
    torch.jit.trace(source, images).save(str(tmp_path / "a.ts"))
    module = External(weights=str(tmp_path / "a.ts")).eval()
    torch.testing.assert_close(module(images), source(images))


def test_normalisation_goes_in_front_where_it_is_given():
    network, images = tiny_network().eval(), images_and_labels()[0]
    assert torch.equal(External(network)(images), network(images))
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    normal = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(
        External(network, input_mean=mean, input_std=std)(images), network(normal)
    )


class Payload:
    """A file that would run code."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.ran_a_payload = True",))


def test_a_file_that_can_run_code_is_refused_unless_trusted(tmp_path):
    import builtins

    weights = {**tiny_network().state_dict(), "extra": Payload()}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="file of tensors but got .*`trust_weights=True` loads"):
        External(tiny_network(), str(tmp_path / "a.pt"))
    assert not hasattr(builtins, "ran_a_payload")
    External(tiny_network(), str(tmp_path / "a.pt"), trust_weights=True)
    assert builtins.ran_a_payload
    del builtins.ran_a_payload


def test_what_does_not_fit_is_named(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(tiny_network(classes=7).state_dict(), path)
    with pytest.raises(ValueError, match=r"8.weight of shape \(10, 256\) but got \(7, 256\)"):
        External(tiny_network(), path)
    torch.save({"0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks 14, such as 0.bias"):
        External(tiny_network(), path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="to hold a state dict but got Tensor"):
        External(tiny_network(), path)
    with pytest.raises(ValueError, match="`weights` to be a file but got nowhere.pt"):
        External(tiny_network(), "nowhere.pt")
    with pytest.raises(ValueError, match="to be a TorchScript file where there is no `network`"):
        External(weights=path)
    with pytest.raises(ValueError, match="but got neither"):
        External()
    with pytest.raises(ValueError, match="`input_mean` and `input_std` together"):
        External(tiny_network(), input_mean=[0.5])


def fake_robustbench(monkeypatch, load):
    utils = types.ModuleType("robustbench.utils")
    utils.load_model = load
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)


def test_a_name_is_looked_up_in_robustbench(monkeypatch):
    asked = []

    def load(name, **kwargs):
        asked.append((name, kwargs))
        if name == "Missing":
            raise KeyError(name)
        if name == "Offline":
            raise ConnectionError("no network")
        return tiny_network()

    fake_robustbench(monkeypatch, load)
    module = External("Carmon2019Unlabeled", threat_model="L2")
    assert module(images_and_labels()[0]).shape == (8, 10)
    assert asked == [("Carmon2019Unlabeled", {"dataset": "cifar10", "threat_model": "L2"})]
    with pytest.raises(ValueError, match="zoo of cifar10 and Linf but got Missing"):
        External("Missing")
    with pytest.raises(
        ValueError, match="Offline to be downloaded by RobustBench, .* but got a ConnectionError"
    ):
        External("Offline")


def test_without_robustbench_a_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    message = r"name Carmon2019Unlabeled, .* ModuleNotFoundError: .*robustbench.*; `pip install rob"
    with pytest.raises(ValueError, match=message):
        External("Carmon2019Unlabeled")


def test_an_architecture_of_the_zoo_takes_a_state_dict(tmp_path):
    if importlib.util.find_spec("autoattack") is None:
        sys.modules["autoattack"] = importlib.import_module("pyautoattack")
    zoo = pytest.importorskip("robustbench.model_zoo.architectures.wide_resnet")
    source = zoo.WideResNet(depth=10, widen_factor=1).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pt")
    module = External(zoo.WideResNet(depth=10, widen_factor=1), str(tmp_path / "a.pt")).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(module(images), source(images))


def test_the_command_line_measures_a_network_and_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SmallResNet(10, 1, width=4)
    torch.save(source.state_dict(), "a.pt")
    network = ["--model.network=robust_flatness.networks.SmallResNet"]
    network += ["--model.network.num_classes=10", "--model.network.width=4"]
    main(["test", "--model=External", *network, "--model.weights=a.pt", *LIGHT])
    results = json.loads(Path("runs/External-Digits-s0/results_test.json").read_text())
    # As it is: the data's normalisation is linked into our own modules alone.
    light = FinalEvaluation(num_examples=8, restarts=1, steps=2, num_perturbations=1)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    assert results["final"] == pytest.approx(evaluate(source, Digits(), [light], **quiet))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fit", "--model=External", "--model.weights=a"], "`test` for External"),
        (["test", "--model=External"], "but got neither"),
        (["test", "--model=External", "--model.weights=a.ts"], "to be a file but got a.ts"),
    ],
)
def test_bad_commands_end_in_a_sentence(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(command)
    assert message in " ".join(capsys.readouterr().err.split())
