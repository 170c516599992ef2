"""The residual networks, and the memory format of their weights."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_flatness.lightning_modules import AT
from robust_flatness.networks import (
    ReparameterizedBatchNorm2d,
    ResNet,
    ResNet18,
    SmallResNet,
    WideResNet,
    WideResNet28x10,
    WideResNet34x10,
    channels_last,
)
from robust_flatness.networks.resnet import BasicBlock, PreactivationBlock

# Each architecture at a size for tests, with the side of its activations for images of 32x32.
SIDES = {
    partial(ResNet18, width=4): 4,
    partial(SmallResNet, width=4): 8,
    partial(ResNet, width=4, blocks=[1, 2]): 16,
    partial(WideResNet, depth=10, widen_factor=1): 8,
}
NETWORKS = pytest.mark.parametrize("build", SIDES, ids=lambda build: build.func.__name__)

# Narrow networks, and the smallest case whose weight gradients corrupted the heap in channels_last.
CODE = """
import torch
from robust_flatness.networks import ResNet18, SmallResNet, channels_last
torch.manual_seed(0)
narrow = [network(10, 1, width=w) for network in (ResNet18, SmallResNet) for w in (2, 4, 6)]
for network in map(channels_last, narrow):
    for _ in range(10):
        network(torch.rand(16, 1, 8, 8)).sum().backward()
smallest = channels_last(torch.nn.Conv2d(4, 8, 1, stride=2))
for _ in range(30):
    smallest(torch.rand(16, 4, 8, 8)).sum().backward()
"""


@pytest.mark.parametrize(
    ("cls", "count"),
    [
        # 11,173,962 of the usual one, and the 960 biases of stem and shortcuts.
        (ResNet18, 11_174_922),
        (WideResNet28x10, 36_479_194),
        (WideResNet34x10, 46_160_474),
    ],
)
@pytest.mark.parametrize("norm", ["reparameterized", "batch"])
def test_parameter_counts_are_the_known_ones(cls, count, norm):
    with torch.device("meta"):
        network = cls(10, 3, norm=norm)
    assert sum(p.numel() for p in network.parameters()) == count


def test_parameters_have_the_names_of_earlier_checkpoints():
    block = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight"]
    block += ["norm2.weight", "norm2.bias"]
    shortcut = ["shortcut.0.weight", "shortcut.0.bias", "shortcut.1.weight", "shortcut.1.bias"]
    expected = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    expected += [f"body.3.{name}" for name in block]
    expected += [f"body.{i}.{name}" for i in (4, 5) for name in block + shortcut]
    expected += ["classifier.weight", "classifier.bias"]
    assert [name for name, _ in SmallResNet(10).named_parameters()] == expected
    wide = [name for name, _ in WideResNet(10, depth=10, widen_factor=2).named_parameters()]
    block = ["norm1.weight", "norm1.bias", "conv1.weight", "norm2.weight", "norm2.bias"]
    block += ["conv2.weight", "shortcut.weight"]
    expected = ["body.0.weight", *(f"body.{i}.{name}" for i in (1, 2, 3) for name in block)]
    expected += ["body.4.weight", "body.4.bias", "classifier.weight", "classifier.bias"]
    assert wide == expected


@NETWORKS
@pytest.mark.parametrize("in_channels", [1, 3])
def test_logits_are_the_classifier_on_the_features(build, in_channels):
    network = build(7, in_channels).eval()
    images = torch.rand(2, in_channels, 16, 16)
    features = network.features(images)
    assert features.shape == (2, network.num_features)
    assert network(images).shape == (2, 7)
    assert torch.equal(network(images), network.classifier(features))


@NETWORKS
def test_the_stem_keeps_the_resolution_and_the_later_stages_halve_it(build):
    network = build(10, 3).eval()
    assert network.body(torch.rand(1, 3, 32, 32)).shape[2:] == (SIDES[build], SIDES[build])
    assert network.body[0].stride == (1, 1)
    assert not any(isinstance(m, nn.MaxPool2d) for m in network.modules())


def test_resnet18_has_biases_where_the_paper_has_them():
    network = ResNet18(10, width=4)
    stem, *others = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert len(others) == 19
    assert stem.bias is not None
    for convolution in others:
        assert (convolution.bias is not None) == (convolution.kernel_size == (1, 1))
    assert network.classifier.bias is not None


def test_weights_are_drawn_as_the_paper_draws_them():
    for module in ResNet18(100, width=16).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            std = float(module.weight.detach().std())
            assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.25)
        elif isinstance(module, nn.Linear):
            std = float(module.weight.detach().std())
            assert std == pytest.approx(math.sqrt(2 / module.in_features), rel=0.05)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_are_what_they_say(out_channels, stride):
    x = torch.randn(2, 4, 6, 6)
    same = (out_channels, stride) == (4, 1)
    # A new normalization in evaluation mode is the identity but for its eps.
    rough = {"rtol": 1e-3, "atol": 1e-4}
    block = BasicBlock(4, out_channels, stride=stride, activation="silu").eval()
    shortcut = x if same else block.shortcut[0](x)
    body = block.conv2(F.silu(block.conv1(x)))
    torch.testing.assert_close(block(x), F.silu(body + shortcut), **rough)
    block = PreactivationBlock(4, out_channels, stride=stride, activation="silu").eval()
    shortcut = x if same else block.shortcut(F.silu(x))
    body = block.conv2(F.silu(block.conv1(F.silu(x))))
    torch.testing.assert_close(block(x), body + shortcut, **rough)


@NETWORKS
def test_activation_and_norm_are_used_everywhere(build):
    kinds = {type(m) for m in build(10, 3, activation="mish", norm="batch").modules()}
    assert {nn.Mish, nn.BatchNorm2d} <= kinds
    assert not kinds & {nn.ReLU, nn.SiLU, nn.GELU, ReparameterizedBatchNorm2d}


@NETWORKS
def test_it_learns_four_images_by_heart(build):
    network = build(4, 1)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert all(p.grad is not None for p in network.parameters())


@NETWORKS
def test_dropout_acts_in_train_mode_in_every_block(build):
    network = build(10, 3, dropout=0.5)
    dropped = []
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda module, inputs, output: dropped.append((output == 0).float().mean())
            )
    network(torch.rand(4, 3, 16, 16))
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock | PreactivationBlock)]
    assert len(dropped) == len(blocks) > 0
    assert min(dropped) > 0.3
    images = torch.rand(4, 3, 16, 16)
    network.eval()
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        *[
            (cls, {argument: 0}, f"Expected `{argument}` to be >= 1 but got 0")
            for cls in (ResNet, ResNet18, SmallResNet, WideResNet)
            for argument in ("num_classes", "in_channels")
        ],
        (SmallResNet, {"width": 0}, "Expected `width` to be >= 1 but got 0"),
        (ResNet, {"blocks": [1, 0]}, "Expected `blocks` to be >= 1 but got 0"),
        (ResNet, {"blocks": []}, "Expected `blocks` to be >= 1 but got 0"),
        (WideResNet, {"widen_factor": 0}, "Expected `widen_factor` to be >= 1 but got 0"),
        (WideResNet, {"depth": 27}, "Expected `depth` to be one of 10, 16, .* but got 27"),
    ],
)
def test_bad_sizes_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"num_classes": 10, **arguments})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) but got shape \(2, 3, 8, 8\)"):
        SmallResNet(10)(torch.rand(2, 3, 8, 8))


class Viewing(nn.Module):
    """Flattens by `view`, which fails on activations in channels_last."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().view(len(x), -1))


class ViewingResNet(SmallResNet):
    """A network of this package that its user changed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.body(x)).view(len(x), -1))


def channels_are_last(network: nn.Module) -> set[bool]:
    """Whether convolutions of more than one pixel and channel are in channels_last."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    return {not w.is_contiguous() for w in weights if w.shape[1] > 1 and w.shape[2] > 1}


def test_narrow_networks_do_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("network", [SmallResNet, ResNet18])
@pytest.mark.parametrize(("width", "last"), [(4, False), (7, False), (8, True), (16, True)])
def test_the_memory_format_depends_on_the_width(network, width, last):
    assert channels_are_last(AT(partial(network, width=width)).network) == {last}


def test_networks_of_other_code_keep_their_memory_format():
    for network in (Viewing(10, 3), ViewingResNet(10, 3), nn.Sequential(nn.Conv2d(3, 8, 3))):
        assert channels_are_last(channels_last(network)) == {False}


@pytest.mark.parametrize("network", [Viewing, partial(ViewingResNet, width=8)])
def test_view_in_forward_works_in_at(network):
    module = AT(network, in_channels=1, mean=[0.3], std=[0.3])
    assert module(torch.rand(4, 1, 8, 8)).shape == (4, 10)


@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 16])
def test_weight_gradients_do_not_depend_on_the_memory_format(width):
    network, plain = SmallResNet(10, 1, width=width), SmallResNet(10, 1, width=width)
    plain.load_state_dict(network.state_dict())
    network, plain = channels_last(network).double(), plain.double()
    images = torch.rand(16, 1, 8, 8, dtype=torch.float64)
    for each in (network, plain):
        each(images).square().sum().backward()
    for ours, reference in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-9)
