"""The layout of weights: fast where it is safe, and never on a network of other code."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robust_flatness.lightning_modules import AT
from robust_flatness.networks import ResNet18, SmallResNet, channels_last

# The smallest case, whose weight gradients corrupted the heap in channels_last, and narrow nets.
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


def innermost(network: nn.Module) -> list[bool]:
    """Whether the channels of each convolution with more than one pixel and channel are last."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    return [not w.is_contiguous() for w in weights if w.shape[1] > 1 and w.shape[2] > 1]


def test_narrow_networks_do_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("network", [SmallResNet, ResNet18])
def test_layout_depends_on_the_width(network: type[nn.Module]) -> None:
    for width, last in ((4, False), (7, False), (8, True), (16, True)):
        layouts = innermost(AT(partial(network, width=width)).network)
        assert layouts
        assert all(layout == last for layout in layouts)


def test_networks_of_other_code_keep_their_layout() -> None:
    for network in (Viewing(10, 3), ViewingResNet(10, 3), nn.Sequential(nn.Conv2d(3, 8, 3))):
        assert not any(innermost(channels_last(network)))


@pytest.mark.parametrize("network", [Viewing, partial(ViewingResNet, width=8)])
def test_view_in_forward_works_in_at(network: type[nn.Module]) -> None:
    module = AT(network, in_channels=1, mean=[0.3], std=[0.3])
    assert module(torch.rand(4, 1, 8, 8)).shape == (4, 10)


@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 16])
def test_weight_gradients_do_not_depend_on_the_layout(width: int) -> None:
    network, plain = SmallResNet(10, 1, width=width), SmallResNet(10, 1, width=width)
    plain.load_state_dict(network.state_dict())
    network, plain = channels_last(network).double(), plain.double()
    images = torch.rand(16, 1, 8, 8, dtype=torch.float64)
    for each in (network, plain):
        each(images).square().sum().backward()
    for ours, reference in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-9)
