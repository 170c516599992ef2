import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_flatness.networks import (
    ReparameterizedBatchNorm2d,
    ResNet18,
    SmallResNet,
    WideResNet,
    WideResNet28x10,
    WideResNet34x10,
)
from robust_flatness.networks.resnet import BasicBlock, PreactivationBlock

# A fresh normalisation in evaluation is the identity but for its eps.
ROUGH = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep tiny convolutions from waiting for threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(cls, *args, **kwargs):
    """One of each architecture at a size for tests."""
    sizes = {ResNet18: {"width": 4}, WideResNet: {"depth": 10, "widen_factor": 1}}
    return cls(*args, **sizes.get(cls, {}), **kwargs)


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


@pytest.mark.parametrize("cls", [ResNet18, SmallResNet, WideResNet])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_logits_are_the_classifier_on_the_features(cls, in_channels):
    network = small(cls, 7, in_channels).eval()
    images = torch.rand(2, in_channels, 16, 16)
    features = network.features(images)
    assert features.shape == (2, network.num_features)
    assert network(images).shape == (2, 7)
    assert torch.equal(network(images), network.classifier(features))


def test_the_stem_keeps_the_resolution_and_the_later_stages_halve_it():
    for cls, size in ((ResNet18, 4), (WideResNet, 8)):
        network = small(cls, 10, 3).eval()
        assert network.body(torch.rand(1, 3, 32, 32)).shape[2:] == (size, size)
        strides = [m.stride[0] for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert strides[0] == 1
    assert not any(isinstance(m, nn.MaxPool2d) for m in ResNet18(10, width=4).modules())


def test_resnet18_has_biases_where_the_paper_has_them():
    network = ResNet18(10, width=4)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    stem, *others = convolutions
    assert stem.bias is not None
    for convolution in others:
        assert (convolution.bias is not None) == (convolution.kernel_size == (1, 1))
    assert network.classifier.bias is not None


def test_weights_are_drawn_as_the_paper_draws_them():
    torch.manual_seed(0)
    network = ResNet18(100, width=16)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert float(module.weight.detach().std()) == pytest.approx(
                math.sqrt(2 / fan_out), rel=0.25
            )
        elif isinstance(module, nn.Linear):
            gain = math.sqrt(2 / module.in_features)
            assert float(module.weight.detach().std()) == pytest.approx(gain, rel=0.05)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()


def test_blocks_are_what_they_say():
    x = torch.randn(2, 4, 6, 6)
    block = BasicBlock(4, 8, stride=2, activation="silu").eval()
    body = block.conv2(F.silu(block.conv1(x)))
    torch.testing.assert_close(block(x), F.silu(body + block.shortcut[0](x)), **ROUGH)
    block = BasicBlock(4, 4, activation="silu").eval()
    body = block.conv2(F.silu(block.conv1(x)))
    torch.testing.assert_close(block(x), F.silu(body + x), **ROUGH)
    block = PreactivationBlock(4, 8, stride=2, activation="silu").eval()
    body = block.conv2(F.silu(block.conv1(F.silu(x))))
    torch.testing.assert_close(block(x), body + block.shortcut(F.silu(x)), **ROUGH)
    block = PreactivationBlock(4, 4, activation="silu").eval()
    body = block.conv2(F.silu(block.conv1(F.silu(x))))
    torch.testing.assert_close(block(x), body + x, **ROUGH)


@pytest.mark.parametrize("cls", [ResNet18, SmallResNet, WideResNet])
def test_activation_and_norm_are_used_everywhere(cls):
    network = small(cls, 10, 3, activation="mish", norm="batch")
    kinds = {type(m) for m in network.modules()}
    assert nn.Mish in kinds
    assert nn.BatchNorm2d in kinds
    assert not kinds & {nn.ReLU, nn.SiLU, nn.GELU, ReparameterizedBatchNorm2d}


@pytest.mark.parametrize("cls", [ResNet18, SmallResNet, WideResNet])
def test_it_learns_four_images_by_heart(cls):
    torch.manual_seed(0)
    network = small(cls, 4, 1)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("cls", [ResNet18, SmallResNet, WideResNet])
@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_sizes_below_one_are_refused(cls, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be >= 1 but got 0"):
        cls(**{"num_classes": 10, "in_channels": 3, argument: 0})


def test_width_and_depth_are_checked():
    with pytest.raises(ValueError, match="Expected `width` to be >= 1 but got 0"):
        SmallResNet(10, width=0)
    with pytest.raises(ValueError, match=r"Expected `depth` to be one of 10, 16, .* but got 27"):
        WideResNet(10, depth=27)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) but got shape \(2, 3, 8, 8\)"):
        SmallResNet(10)(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "build",
    [
        partial(ResNet18, width=2),
        partial(SmallResNet, width=2),
        partial(WideResNet, depth=10, widen_factor=1),
    ],
)
def test_dropout_acts_in_train_mode_in_every_block(build):
    torch.manual_seed(0)
    network = build(10, 3, dropout=0.5)
    images = torch.rand(4, 3, 16, 16)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    assert not torch.equal(network(images), network(images))
    dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    seen = []

    def zeros(module, inputs, output):
        seen.append((output == 0).float().mean())

    for dropout in dropouts:
        dropout.register_forward_hook(zeros)
    network(images)
    assert len(seen) == len(dropouts) > 0
    assert all(share > 0.3 for share in seen)
    network.eval()
    assert torch.equal(network(images), network(images))
