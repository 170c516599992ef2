"""The recipes of docs/elsewhere.md, block by block."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, blocks
from torch import nn
from torch.nn.functional import avg_pool2d, relu

from robust_flatness.lightning_modules import AT, External, load_checkpoint

CHECKPOINT = Path(__file__).parent / "fixtures/run_ba960bd/checkpoints/best.ckpt"
FIRST, EXPORT, ONNX, SAFETENSORS, ROBUSTBENCH = blocks(ROOT / "docs/elsewhere.md", "python")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the first block defines, for the checkpoint of an earlier version."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(FIRST.replace("runs/ATAWP-Digits-s0/checkpoints/best.ckpt", str(CHECKPOINT)), names)
    return names


def test_the_plain_module_gives_the_bits_of_the_module(names):
    network, images = names["network"], names["images"]
    module = load_checkpoint(CHECKPOINT)
    assert torch.equal(names["logits"], module(images))
    assert not torch.equal(names["logits"], module.network(images))
    assert not any(part.training for part in network.modules())
    # A copy: training goes on without it.
    assert module.network.classifier.weight is not network.network.classifier.weight
    external = External(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    assert torch.equal(external.to_torch()(images), external(images))


@pytest.mark.slow
def test_an_exported_program_runs_without_this_package(names):
    exec(EXPORT, names)
    more = torch.rand(7, 1, 8, 8)
    torch.testing.assert_close(names["exported"](more), names["network"](more))
    torch.save((more, names["network"](more)), "expected.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['robust_flatness'] = None\n"
        "images, logits = torch.load('expected.pt')\n"
        "program = torch.export.load('network.pt2').module()\n"
        "torch.testing.assert_close(program(images), logits)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_onnx(names):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    names["batch"] = {0: torch.export.Dim("batch", min=1)}
    exec(ONNX, names)
    session = ReferenceEvaluator("network.onnx")
    more = torch.rand(3, 1, 8, 8)
    (logits,) = session.run(None, {session.input_names[0]: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), names["network"](more))


def test_safetensors(names):
    pytest.importorskip("safetensors")
    exec(
        SAFETENSORS.replace("load_model(network", "zero(network)\nload_model(network"),
        names | {"zero": lambda network: [p.data.zero_() for p in network.parameters()]},
    )
    assert torch.equal(names["network"](names["images"]), names["logits"])


class TheirBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self.shortcut(x))


class TheirResNet18(nn.Module):
    """Names, shapes and forward of RobustBench's `Modas2021PRIMEResNet18`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
        self.register_buffer("sigma", torch.ones(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for stage, width in enumerate((64, 128, 256, 512)):
            first = TheirBlock(width // (2 if stage else 1), width, 2 if stage else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, TheirBlock(width, width, 1)))
        self.linear = nn.Linear(512, 10)

    def forward(self, x):
        out = relu(self.bn1(self.conv1((x - self.mu) / self.sigma)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(avg_pool2d(out, 4).flatten(1))


def test_robustbench_layout():
    torch.manual_seed(0)
    module = AT()
    for parameter in module.parameters():
        # Biases and scales are zero at first.
        parameter.data += 0.02 * torch.randn_like(parameter)
    images = torch.rand(2, 3, 32, 32)
    module(images)
    network = module.to_torch()
    names = {"torch": torch}
    exec(ROBUSTBENCH, names)
    theirs = TheirResNet18().eval()
    theirs.load_state_dict(names["robustbench_resnet18"](network), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), network(images), rtol=1e-4, atol=1e-4)
