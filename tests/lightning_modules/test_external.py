"""Networks that were trained elsewhere."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_body, tiny_network

from robust_flatness.callbacks import FinalEvaluation, evaluate
from robust_flatness.cli import main
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT, External
from robust_flatness.networks import SmallResNet

LINEAR = ["--model.network=torch.nn.Linear", "--model.network.in_features=64"]
FACTORY = """
from torch import nn
def make(width): return nn.Sequential(nn.Flatten(), nn.Linear(64, width))
"""
LIGHT = ["--final.num_examples=8", "--final.restarts=1", "--final.steps=2"]
LIGHT += ["--final.num_perturbations=1", "--without=[autoattack]", "--trainer.accelerator=cpu"]


PREFIXES = ["", "module.", "network.", "module.model.", "_orig_mod.", "module._orig_mod.", "net."]
PREFIXES += ["model._orig_mod.module.", "generator.body."]
PLACES = [None, "state_dict", "model_state_dict", "model_state", "net", "weights", "ema"]


@pytest.mark.parametrize(
    ("prefix", "place"),
    [(prefix, None) for prefix in PREFIXES] + [("module.", place) for place in PLACES],
)
def test_a_state_dict_is_loaded_whatever_wrapped_it(prefix, place, tmp_path):
    source, images = tiny_network(seed=3).eval(), images_and_labels()[0]
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": 0.1}
    file = weights if place is None else {place: weights, "epoch": 3, "optimizer": optimizer}
    torch.save(file, tmp_path / "a.pt")
    module = External(tiny_network(seed=4), str(tmp_path / "a.pt")).eval()
    assert torch.equal(module(images), source(images))


def test_wrappers_inside_the_network_or_around_it_do_not_matter(tmp_path):
    parts = dict(tiny_network(seed=3).state_dict())
    inside = {name.replace("3.", "3.module.", 1): value for name, value in parts.items()}
    torch.save({"state_dict": inside}, tmp_path / "a.pt")
    compiled = torch.compile(tiny_network(seed=4))
    module = External(compiled, str(tmp_path / "a.pt"))
    assert torch.equal(module.network.state_dict()["_orig_mod.3.weight"], parts["3.weight"])


def test_a_whole_module_and_a_file_without_counters_load(tmp_path):
    source, images = tiny_network(seed=3).eval(), images_and_labels()[0]
    path = str(tmp_path / "a.pt")
    torch.save({"model": source, "epoch": 3}, path)
    module = External(tiny_network(seed=4), path, trust_weights=True).eval()
    assert torch.equal(module(images), source(images))
    state = source.state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(External(tiny_network(seed=4), path).eval()(images), source(images))


def test_weights_of_training_come_before_averages_and_a_warning_names_both(tmp_path, recwarn):
    trained, average = tiny_network(seed=3).state_dict(), tiny_network(seed=5).state_dict()
    path = str(tmp_path / "a.pt")
    torch.save({"ema": {"module": average}, "model": trained}, path)
    module = External(tiny_network(seed=4), path)
    assert torch.equal(module.network[0].weight, trained["0.weight"])
    said = [str(w.message) for w in recwarn if "more than once" in str(w.message)]
    assert len(said) == 1
    assert "`model.` are taken, and not those of `ema.`" in said[0]
    torch.save({"ema": trained, "model": trained}, path)
    recwarn.clear()
    External(tiny_network(seed=4), path)
    assert not [w for w in recwarn if "more than once" in str(w.message)]


def test_weights_that_the_network_lacks_are_not_left_out(tmp_path):
    path = str(tmp_path / "a.pt")
    state = {f"module.{name}": value for name, value in tiny_network().state_dict().items()}
    torch.save({"state_dict": {**state, "module.9.weight": torch.zeros(2)}}, path)
    message = "all weights of .* but it lacks 1, such as state_dict.module.9.weight"
    with pytest.raises(ValueError, match=message):
        External(tiny_network(), path)


def test_a_normalisation_of_the_file_is_not_left_out(tmp_path):
    path, images = str(tmp_path / "a.ckpt"), images_and_labels()[0]
    trained = AT(tiny_body, mean=[0.5] * 3, std=[0.25] * 3).eval()
    torch.save({"state_dict": trained.state_dict()}, path)
    message = "`input_mean` and `input_std`, as .* has a normalization, state_dict.normalize.mean"
    with pytest.raises(ValueError, match=message):
        External(tiny_network(seed=4), path)
    module = External(tiny_network(seed=4), path, input_mean=[0.5] * 3, input_std=[0.25] * 3)
    torch.testing.assert_close(module.eval()(images), trained(images))


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
    torch.save({"state_dict": {"0.weight": torch.zeros(1)}}, path)
    message = "lacks 14, such as 0.bias; it holds 1, such as state_dict.0.weight"
    with pytest.raises(ValueError, match=message):
        External(tiny_network(), path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="lacks 15, such as 0.weight; it is empty"):
        External(tiny_network(), path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="to hold a state dict but got Tensor"):
        External(tiny_network(), path)
    with pytest.raises(ValueError, match="`weights` to be a file but got nowhere.pt"):
        External(tiny_network(), "nowhere.pt")
    with pytest.raises(ValueError, match="to be a TorchScript file, as there is no `network`"):
        External(weights=path)
    with pytest.raises(ValueError, match="but got neither"):
        External()
    with pytest.raises(ValueError, match="`input_mean` and `input_std` together"):
        External(tiny_network(), input_mean=[0.5])
    with pytest.raises(ValueError, match="`network` to be a torch.nn.Module, .* but got tiny_body"):
        External(tiny_body)
    with pytest.raises(ValueError, match="but got collections.OrderedDict, a class of another"):
        External("collections.OrderedDict")


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
        if name == "Odd":
            raise ValueError("'L3' is not a valid ThreatModel")
        return tiny_network()

    fake_robustbench(monkeypatch, load)
    module = External("Carmon2019Unlabeled", threat_model="L2")
    assert module(images_and_labels()[0]).shape == (8, 10)
    assert asked == [("Carmon2019Unlabeled", {"dataset": "cifar10", "threat_model": "L2"})]
    with pytest.raises(ValueError, match="zoo of cifar10 and Linf but got Missing"):
        External("Missing")
    with pytest.raises(ValueError, match="got cifar10 and L3: 'L3' is not a valid ThreatModel"):
        External("Odd", threat_model="L3")
    with pytest.raises(
        ValueError, match="Offline to be downloaded by RobustBench, .* but got a ConnectionError"
    ):
        External("Offline")


def test_a_robustbench_that_does_not_import_says_why(monkeypatch, tmp_path):
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("import pkg_resources_of_setuptools\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    message = "No module named 'pkg_resources_of_setuptools'; `pip install robustbench 'setuptools"
    with pytest.raises(ValueError, match=message):
        External("Carmon2019Unlabeled")


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
        (
            ["test", "--model=External", "--model.network=own.Net"],
            "own.Net to import but own raises ModuleNotFoundError: No module named 'not_there'",
        ),
        (
            ["test", "--model=External", "--model.network=collections.OrderedDict"],
            "a class of them, or a function that builds one, but got collections.OrderedDict",
        ),
        (
            ["test", "--model=External", *LINEAR, "--model.network.out_features=10", *LIGHT],
            "`--model.network` to take images of shape (1, 8, 8) but it raises RuntimeError: ",
        ),
        (
            ["test", "--model=External", "--model.network=factories.make", *LIGHT],
            "make() missing 1 required positional argument: 'width'",
        ),
        (
            [
                "test",
                "--model=External",
                "--model.network=factories.make",
                "--model.network.width=3",
                *LIGHT,
            ],
            "`labels` to be >= 0 and below the 3 classes but got 0 to 9",
        ),
    ],
)
def test_bad_commands_end_in_a_sentence(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text("import not_there\n")
    (tmp_path / "factories.py").write_text(FACTORY)
    with pytest.raises(SystemExit):
        main(command)
    sys.modules.pop("factories", None)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("runs/*"))


def test_a_factory_without_annotations_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "factories.py").write_text(FACTORY)
    options = ["--model.network=factories.make", "--model.network.width=10"]
    main(["test", "--model=External", *options, *LIGHT])
    sys.modules.pop("factories", None)
    assert Path("runs/External-Digits-s0/results_test.json").is_file()
